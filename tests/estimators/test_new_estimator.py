"""A replay refuses the run of an estimator whose updates it does not know, rather than lead to other weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
from models import block_mlp, real_loss

import zo_kernels as zo
from zo_kernels.estimators.protocol import Estimate, Step
from zo_kernels.estimators.spsa import SPSA


class Signs(SPSA):
    """Moves by the sign of g alone."""

    def estimate(self, step: Step) -> Estimate:
        made = super().estimate(step)
        numbers = replace(made.numbers, along=[1.0 if g > 0 else -1.0 for g in made.numbers.along])
        probes, seeds, _ = made.update.args  # type: ignore[attr-defined]
        return replace(made, update=partial(self.finish_step, probes, seeds, numbers))


class SignSGD(zo.ZeroOrderOptimizer):
    def __init__(self, params, **options):
        super().__init__(params, _estimator=Signs(), **options)


def test_the_run_is_not_replayed_as_another(tmp_path) -> None:
    model = block_mlp(depth=2, width=4)
    start = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"estimator: Signs computes updates that a replay does not know"):
        opt = SignSGD(model, lr=1e-3, trajectory=tmp_path / "run.zo")
    for i in range(3):
        opt.step(lambda i=i: real_loss(model, i))
    with pytest.raises(ValueError, match="upto=0"):
        zo.replay(start, opt.trajectory)
    del opt
    with pytest.warns(UserWarning, match="estimator: Signs"):
        again = SignSGD(start, lr=1e-3)
    with pytest.raises(ValueError, match="upto=0"):
        again.resume(tmp_path / "run.zo")
