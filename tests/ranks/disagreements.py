"""One rank does otherwise than the others: what may differ, from the start or from the fourth step on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import scenarios
import torch
from inside import agreed_of, channel_of, forget_anchor, parallel_of
from models import block_mlp
from torch import distributed, nn

import zo_kernels as zo
from zo_kernels.ranks.channel import hash64

STEPS = 6
ODD_STEP = 3  # steps taken before one rank changes its mind


@dataclass(frozen=True)
class Case:
    """Args:
    said: in what every rank says; {odd} and {others} stand for ranks.
    method, options: of all.
    odd: the odd one's own options; those of `build` in "method", those of the model in "model", of `Parallel` in "how".
    change: what the odd one does to its optimizer and model after some steps.
    error: of the others.
    """

    said: str
    odd: dict[str, Any] = field(default_factory=dict)
    change: Callable[[zo.ZeroOrderOptimizer, nn.Module], Any] | None = None
    method: str = "MeZO"
    split: str = "batch"
    options: dict[str, Any] = field(default_factory=dict)
    error: str = "RanksDiffer"


def _set(key: str, value: Any) -> Callable[[zo.ZeroOrderOptimizer, nn.Module], None]:
    return lambda opt, model: opt.param_groups[0].__setitem__(key, value)


def _other_group(opt: zo.ZeroOrderOptimizer, model: nn.Module) -> None:
    opt.add_param_group({"params": [("extra", nn.Parameter(torch.ones(3)))], "lr": 0.1})


def _in_vain(opt: zo.ZeroOrderOptimizer, model: nn.Module) -> None:
    """A step that others do not take."""
    opt.step_count += 1


def _resume(opt: zo.ZeroOrderOptimizer, model: nn.Module) -> None:
    zo.MeZO(model, lr=0.1, parallel=parallel_of(opt)).resume("nowhere.zo")


def _load(opt: zo.ZeroOrderOptimizer, model: nn.Module) -> None:
    opt.load_state_dict({**opt.state_dict(), "zo": {**opt.state_dict()["zo"], "directions": 3}})


def _anew(opt: zo.ZeroOrderOptimizer, model: nn.Module) -> zo.ZeroOrderOptimizer:
    made = zo.MeZO(model, lr=1e-2, seed=7, parallel=parallel_of(opt))
    made.step_count = opt.step_count
    return made


START = {
    "seed": Case("seed: 7 on {others}, 8 on {odd}", {"seed": 8}),
    "directions": Case("directions: 1 on {others}, 2 on {odd}", {"directions": 2}),
    "many directions": Case("directions: 1 on {others}, 900 on {odd}", {"directions": 900}),
    "eps": Case("eps: 0.001 on {others}, 0.002 on {odd}", {"eps": 2e-3}),
    "lr": Case("learning rates: [0.01] on {others}, [0.5] on {odd}", {"lr": 0.5}),
    "weight decay": Case("weight_decay: [0.0] on {others}, [0.5] on {odd}", {"weight_decay": 0.5}),
    "sparsity": Case("sparsity: [0.0] on {others}, [0.5] on {odd}", {"sparsity": 0.5}),
    "drop": Case("drop: 0.5 on {others}, 0.25 on {odd}", {"drop": 0.25}, method="LeZO"),
    "perturb": Case("perturb: in_place on {others}, in_forward on {odd}", {"perturb": "in_forward"}),
    "rounding": Case("stochastic rounding: True on {others}, False on {odd}", {"rounding": "nearest"}),
    "distribution": Case(
        "distribution: normal on {others}, rademacher on {odd}", {"distribution": "rademacher"}, method="MeZOSVRG"
    ),
    "mask": Case("mask: redrawn on {others}, kept on {odd}", {"mask": "kept"}),
    "anneal": Case("anneal: None on {others}, 5.0 on {odd}", {"anneal": 5}, method="MeZOSVRG"),
    "strict": Case("strict: False on {others}, True on {odd}", {"strict": True}),
    "split": Case(
        "parallel: batch on {others}, directions on {odd}", {"how": {"split": "directions"}}, options={"directions": 12}
    ),
    "check": Case("check_every: 2 on {others}, 0 on {odd}", {"how": {"check_every": 0}}),
    "method": Case("method: MeZO on {others}, SparseMeZO on {odd}", {"method": "SparseMeZO", "sparsity": 0.0}),
    "SVRG": Case("method: MeZO on {others}, MeZOSVRG on {odd}", {"method": "MeZOSVRG"}),
    "not SVRG": Case("method: MeZOSVRG on {others}, MeZO on {odd}", {"method": "MeZO"}, method="MeZOSVRG"),
    "anchor every": Case("anchor_every: 5 on {others}, 2 on {odd}", {"anchor_every": 2}, method="MeZOSVRG"),
    "anchor lr": Case("anchor_lr: [0.01] on {others}, [0.5] on {odd}", {"anchor_lr": 0.5}, method="MeZOSVRG"),
    "shared": Case(
        "shared_direction: True on {others}, False on {odd}", {"shared_direction": False}, method="MeZOSVRG"
    ),
    "depth": Case("parameter blocks.2.norm.weight: ", {"model": {"depth": 3}}),
    "width": Case("parameter embed.weight: torch.float32 (", {"model": {"width": 5}}),
    "dtype": Case("parameter embed.weight: torch.", {"model": {"dtype": torch.bfloat16}}),
}
LATER = {
    "lr": Case("learning rates: [0.01] on {others}, [0.5] on {odd}", change=_set("lr", 0.5)),
    "eps": Case("eps: 0.001 on {others}, 0.002 on {odd}", change=_set("eps", 2e-3)),
    "weight decay": Case("weight_decay: [0.0] on {others}, [0.1] on {odd}", change=_set("weight_decay", 0.1)),
    "directions": Case(
        "directions: 1 on {others}, 5 on {odd}", change=lambda opt, model: setattr(opt, "directions", 5)
    ),
    "fewer directions": Case(
        "directions: 24 on {others}, 12 on {odd}",
        change=lambda opt, model: setattr(opt, "directions", 12),
        split="directions",
        options={"directions": 24},
    ),
    "group": Case("weight_decay: [0.0] on {others}, [0.0, 0.0] on {odd}", change=_other_group),
    "frozen": Case(
        "parameter head.bias: ",
        change=lambda o, m: m.head.bias.requires_grad_(False),
    ),
    "step": Case("steps taken: 3 on {others}, 4 on {odd}", change=_in_vain),
    "step of SVRG": Case("steps taken: 3 on {others}, 4 on {odd}", change=_in_vain, method="MeZOSVRG"),
    "resume": Case("it takes a step on {others}, it resumes a trajectory on {odd}", change=_resume),
    "state": Case("directions: 1 on {others}, 3 on {odd}", change=_load),
    "optimizer": Case("its optimizer is new, or has new options on {odd}", change=_anew),
    "anchor": Case(
        "steps since the anchor: 3 on {others}, none on {odd}", change=lambda o, m: forget_anchor(o), method="MeZOSVRG"
    ),
    "bad lr": Case("it could not begin on {odd}", change=_set("lr", -1.0), error="RankRaised"),
    "bad lr of SVRG": Case(
        "it could not begin on {odd}", change=_set("lr", "high"), method="MeZOSVRG", error="RankRaised"
    ),
    "no closure": Case(
        "it could not begin on {odd}", change=lambda o, m: setattr(o, "called_with", 3), error="RankRaised"
    ),
}


def disagree(group: Any, when: str, name: str, odd: int) -> dict[str, Any]:
    """What is said on this rank, by which error, and what is left of its run."""
    case = {"start": START, "later": LATER}[when][name]
    is_odd = distributed.get_rank(group) == odd
    own = dict(case.odd) if is_odd else {}
    method, how, shape = own.pop("method", case.method), own.pop("how", {}), own.pop("model", {})
    model, start = block_mlp(**{**scenarios.SHAPE, **shape}), block_mlp(**{**scenarios.SHAPE, **shape})
    parallel = zo.Parallel(**{"split": case.split, "process_group": group, "check_every": 2, "timeout": 20.0, **how})
    opt = scenarios.build(method, model, parallel=parallel, **{**case.options, **own})
    said, steps = "", 0
    try:
        for step in range(STEPS):
            steps = opt.step_count
            if step == ODD_STEP and is_odd and case.change is not None:
                made = case.change(opt, model)
                opt = made if isinstance(made, zo.ZeroOrderOptimizer) else opt
            steps = opt.step_count
            if hasattr(opt, "called_with"):
                opt.step(3)  # type: ignore[arg-type]
            scenarios.take_step(opt, model, group, case.split)
    except (zo.RanksDiffer, RuntimeError, ValueError, TypeError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    whole = True
    if not (is_odd and case.change is not None):
        zo.replay(start, opt.trajectory)
        whole = all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    return {"said": said, "steps": opt.step_count - steps, "whole": whole, "failed": step}


def writes(group: Any, step: int) -> tuple[str, int]:
    """The second rank's closure writes to a weight: what is said on this rank, and the steps that it has counted."""
    model = block_mlp(**scenarios.SHAPE)
    opt = scenarios.build("MeZO", model, parallel=zo.Parallel("batch", group, timeout=20.0), perturb="in_place")
    for _ in range(step):
        scenarios.take_step(opt, model, group, "batch")

    def closure() -> torch.Tensor:
        if distributed.get_rank(group) == 1:
            model.head.weight.mul_(0.5)
        return model.head.weight.mean()

    try:
        opt.step(closure)
        return "", opt.step_count
    except ValueError as error:
        return f"{type(error).__name__}: {error}", opt.step_count


def crafted(group: Any, messages: int) -> list[str]:
    """The last rank sends numbers at random, of the right size, in place of a step; what each leads to on this rank."""
    random = torch.Generator().manual_seed(3)
    bad = distributed.get_rank(group) == distributed.get_world_size(group) - 1
    model = block_mlp(**scenarios.SHAPE)
    opt = scenarios.build("MeZO", model, parallel=zo.Parallel("batch", group, check_every=0, timeout=20.0))
    scenarios.take_step(opt, model, group, "batch")
    before, said = scenarios.weights_of(model), []
    channel = channel_of(opt)
    for i in range(messages):
        message = torch.randint(-(2**63), 2**63 - 1, (6,), generator=random)
        if i % 2:  # the step, and something that may be done in it
            message[0] = opt.step_count << 8 | int(message[0]) & 31
        if i % 4 == 3:  # all is well but the losses
            message[0] = opt.step_count << 8
            message[4:] = (
                torch.tensor([float("nan"), float("-inf"), 1e308][i // 4 % 3]).view(1).double().view(torch.int64)
            )
        if bad:
            if i % 4 == 3:
                message[1] = hash64(agreed_of(opt))
            channel.rows(message, "", 20.0)
            opt.step_count += i % 4 == 3  # which is skipped on the others
            channel.texts(f"differ/{channel.exchanges}", f"[{'[' * i}")
            continue
        try:
            scenarios.take_step(opt, model, group, "batch")
            said.append("")
        except (RuntimeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
            channel.texts(f"differ/{channel.exchanges}", "")
    after = scenarios.weights_of(model)
    return [*said, *(name for name in before if not torch.allclose(before[name], after[name], atol=1e-5))]
