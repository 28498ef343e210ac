"""`claims`: what the methods' papers claim, measured again.

- `perturbation-dominates` (arXiv 2410.09823): most of a MeZO step goes to its passes over the weights.
- `lezo` (2410.09823): leaving out blocks trains faster than MeZO, by steps and by time.
- `sparse-mezo` (2402.15751): training small weights alone is better than all, large or random ones.
- `16-bits`: the same training in bf16 with each perturbation and rounding, and in fp32.
- `rademacher-variance`, `rademacher` (Spall 1992): random signs have a lower variance; they learn as normals do, along
  one direction a step and along the mean of several.
- `fewer` (2506.09034, 2605.03869): one-sided estimates and normalised steps need fewer forwards, and a rate that is
  guessed less well; what else is said to help; and first order beside them.
- `svrg-variance`, `svrg-least-squares`, `svrg-mlp` (2404.08080): less variance, and runs that converge faster.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch

from ..bench.document import interval, number
from ..bench.registry import Case, Row
from ..step.methods import Method
from . import variance
from .arms import library, masked
from .fewer import cases as fewer
from .learning import Arm, Study, by_time
from .steps import DROPS, SPARSE, StepTimes, lezo
from .svrg import training
from .svrg import variance as svrg_variance
from .tasks import LANGUAGE, studies

_SPARSITIES = (0.5, 0.65, 0.75, 0.8)
_ABLATED = 0.75
_MASKS = {"large": ("large", True), "random": ("random", False), "small-mask-kept": ("small", False)}  # kind, redrawn
_DIRECTIONS = (1, 4)
_SIXTEEN = "small-letters"  # of the two, that with the smaller learning rate: more of an update is below half an ulp


def cases(options: Namespace) -> list[Case]:
    """What is timed goes first: the rest takes long, and does not mind what else the machine does."""
    times = StepTimes(options)
    return [
        *times.cases(),
        *_learning(options, times),
        *variance.cases(options),
        *svrg_variance.cases(options),
        *training.cases(options),
        *fewer.cases(options),
    ]


def _learning(options: Namespace, times: StepTimes) -> Iterator[Case]:
    dense, found = library("MeZO", options), studies(options)

    def case(
        claim: str, task: str, name: str, arm: Arm, method: Method | None = None, against: Arm = dense, **more: object
    ) -> Case:
        facts: Row = {"claim": claim, "experiment": "learning", "task": task, "dtype": "float32", **more}
        measure = partial(_learned, found[task], arm, against, times, method)
        return Case(f"{claim}/{name}", facts, measure, found[task].skipped)

    for task in found:
        for drop in (0.0, *(DROPS if task in LANGUAGE else DROPS[1:])):
            arm = library(f"LeZO {drop:g}", options, drop=drop) if drop else dense
            yield case("lezo", task, f"{task}/drop-{drop:g}", arm, lezo(drop) if drop else None, drop=drop)
    for task in found:
        yield case("sparse-mezo", task, f"{task}/all", dense)
        for s in _SPARSITIES if task == "capitals" else (_ABLATED,):
            # A pass looks at every weight, so that its time is that of any sparsity.
            arm = library(f"SparseMeZO {s:g}", options, sparsity=s)
            yield case("sparse-mezo", task, f"{task}/small-{s:g}", arm, SPARSE)
        for name, (kind, redrawn) in _MASKS.items() if task in LANGUAGE else ():
            name = name.replace(kind, f"{kind}-{_ABLATED:g}")
            arm = masked(name, options, sparsity=_ABLATED, kind=kind, redrawn=redrawn)
            yield case("sparse-mezo", task, f"{task}/{name}", arm)
    for task in found:
        for n in _DIRECTIONS if task in LANGUAGE else _DIRECTIONS[:1]:
            suffix, several = ("", {}) if n == 1 else (f", {n} directions", {"directions": n})
            normals = library(f"MeZO{suffix}", options, **several) if several else dense
            signs = library(f"signs{suffix}", options, distribution="rademacher", **several)
            for distribution, arm in (("normal", normals), ("rademacher", signs)):
                facts = {"distribution": distribution, "directions": n}
                yield case("rademacher", task, f"{task}/{n}/{distribution}", arm, against=normals, **facts)
    yield case("16-bits", _SIXTEEN, "fp32", dense, dtype="fp32")
    for perturb in ("in_place", "in_forward"):
        for rounding in ("nearest", "stochastic"):
            name = f"bf16/{perturb}/{rounding}"
            arm = library(name, options, dtype=torch.bfloat16, perturb=perturb, rounding=rounding)
            yield case("16-bits", _SIXTEEN, name, arm, dtype="bf16")


def _learned(study: Study, arm: Arm, against: Arm, times: StepTimes, method: Method | None) -> list[Row]:
    """Rows of the runs of an arm; where its steps are a method's that is timed, they are compared by time too."""
    rows = study.rows(arm, against)
    if method is not None:
        rows[-1] |= by_time(study.result(arm).curves, study.result(against).curves, times.shares(method))
    return rows


_SHOWN = {
    "learning": {"lr": ".2e", "start_loss": ".4f", "dev_loss": ".4f", "test_loss": ".4f", "test_accuracy": ".3f"}
    | {"dev_loss_difference": "+.4f", "ours_time_to_loss_ratio": ".2f", "highest_useful_lr": ".2e"},
    "variance": {"elements": ",", "variance": ".4g", "expected": ".6g", "mean_square": ".4g", "to_normal_ratio": ".3g"},
    "svrg-variance": {"full_batch_worth": ".3g", "mezo_variance": ".3g", "variance": ".3g", "to_mezo_ratio": ".3g"}
    | {"expected_ratio": ".3g"},
    "runs": {"steps": ",", "queries": ",", "lr": ".1e", "anchor_lr": ".1e", "loss": ".3g", "to_mezo_ratio": ".3g"},
}

_SHOWN |= {
    "forwards": {"lr": ".2e", "dev_loss": ".4f", "forwards_ratio": ".2f", "window_factor": ".1f"},
    "first-order": {"lr": ".2e", "dev_loss": ".4f", "forwards_ratio": ".2f", "memory_mib": ",.1f"},
    "auto": {"lr": ".2e", "dev_loss": ".4f", "loss_ratio": ".3f", "forwards_price": ".0f"},
    "masks": {"lr": ".2e", "dev_loss": ".4f", "left_mask": ".3f", "dev_loss_difference": "+.4f"},
}
_SHOWN["others"] = _SHOWN["forwards"]

_VERDICTS = ("forwards_verdict", "loss_verdict", "dev_loss_difference_verdict", "to_mezo_verdict", "to_normal_verdict")


def cells(row: Row) -> dict[str, str]:
    if row.get("experiment") == "step":
        shares = {"passes": "passes_share", "its passes": "baseline_passes_share"}
        ms = f"{row['seconds_median'] * 1e3:,.1f}"
        return {"ms/step": ms, **{heading: f"{row[key]:.1%}" for heading, key in shares.items()}}
    shown = _SHOWN[row.get("experiment") or ("svrg-variance" if row["claim"] == "svrg-variance" else "runs")]
    of = {"at equal": row["budget"]} if "budget" in row else {}
    of |= {"arm": row["arm"]} if row.get("experiment") == "masks" else {}
    of |= {key: row[key] for key in ("distribution", "directions") if "place" in row and key in row}
    seed = f"mean of {row['runs']}" if row["run_seed"] is None else str(row["run_seed"])
    texts = {key: (interval if f"{key}_low" in row else number)(row, key, form) for key, form in shown.items()}
    return {
        **of,
        "seed": seed,
        **texts,
        "verdict": next((row[key] for key in _VERDICTS if row.get(key)), ""),
    }
