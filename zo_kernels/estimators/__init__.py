"""Estimators: which losses a step evaluates, and how it computes the update from them.

- `protocol`: `Step`, which an estimator gets; `Estimate`, which it returns; `Estimator`, its base class
- `spsa`: SPSA, the difference of two losses along each direction
- `normalize`: what the learning rates of a step are divided by
- `svrg`: MeZO-SVRG, which also uses estimates at an anchor
- `path`: θ as an anchor plus a sum of directions
- `svrg_state`: checks MeZO-SVRG's part of a state that is loaded
- `numbers`: projected gradients from losses, and whether the step is skipped
- `draws`: the seeds and the dropped blocks of a step
"""
