"""Notices weights that are read where perturbation in the forward does not reach them.

A weight is perturbed only while its own module runs. Code that reads it elsewhere (a tied weight in another module, a
loss that uses `model.embed.weight`, a view that was kept) would get θ instead of θ ± εz, and g would be wrong. Two
mechanisms notice such reads, and a policy chooses between them:

- `seals`: always on, and free until broken. While its module does not run, each weight has a class that PyTorch asks
  before every operation on it. This tells that the weight was used, not by which module; it misses reads through
  another tensor with the same memory, and those of TorchScript.
- `watch`: sees everything, and costs 5 % of a forward. A dispatch mode compares the addresses that each operation
  reads with those of the weights, so it finds aliases, too, and knows which module runs.
- `watch_policy`: decides. Before an evaluation: watch it if it is the first, if modules changed, if aliases exist, if
  the weights cannot be sealed, or if the step is sampled (one in 64). After one that was not watched: evaluate again,
  watched, if there were signs (a seal was broken, modules ran in a new order, gradients were on).

If a watched evaluation finds reads, `check_reachable` sorts them: a module that reads another's weight is given a
perturbed copy of it from then on; a read that no copy can reach is a ValueError, before any wrong step.
"""
