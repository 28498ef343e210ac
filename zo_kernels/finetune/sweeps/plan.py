"""The runs of a sweep and their results."""

from __future__ import annotations

import csv
import io
import math
import os
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from zo_kernels import files
from zo_kernels.finetune.config import AUTO, Config
from zo_kernels.finetune.folders import run_folder, schema
from zo_kernels.finetune.folders.claims import Kind
from zo_kernels.finetune.folders.metrics import records_of
from zo_kernels.finetune.runs.stopping import StopRule

PLAN, TABLE = "sweep.json", "sweep.csv"
_MOST_RUNS = 10_000
_HINTS = {
    "out": str, "settings": dict, "lr": tuple[float | None, ...], "eps": tuple[float, ...], "stop_margin": float
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep: one run with `settings` for every combination of `lr` and `eps`."""

    out: str
    settings: dict[str, Any]
    lr: tuple[float | None, ...]
    eps: tuple[float, ...]
    stop_margin: float

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def rule(self) -> StopRule:
        return StopRule(self.stop_margin)

    def configs(self) -> list[Config]:
        """The settings of every run. Raises ValueError as `Config` does."""
        configs = [Config(**self.settings, lr=lr, eps=eps) for lr in self.lr for eps in self.eps]
        for config in configs:
            config.out = str(self.folder / f"lr-{config.lr}-eps-{config.eps}")
        return configs

    def command(self, config: Config) -> str:
        """The command line that does one of the runs on its own."""
        defaults = {field.name: field.default for field in fields(Config)}
        chosen = {**self.settings, "lr": config.lr, "eps": config.eps, "overwrite": False, "out": f"{self.out}-again"}
        words = ["zo-finetune"]
        for name, value in chosen.items():
            if value != defaults[name]:
                words += ["--" + name.replace("_", "-"), str(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Result:
    """The result of a run, at its last evaluation on the development examples.

    `dev_loss` is None if it was not finite. `stopped` says why the run was stopped; None if it was not.
    """

    lr: float | None
    eps: float
    steps: int
    dev_loss: float | None
    dev_accuracy: float
    dev_f1: float | None
    stopped: str | None
    folder: str

    @property
    def rank(self) -> tuple[bool, float, float]:
        """The best run has the smallest rank: runs that reached their end first, then by score, then by loss."""
        score = self.dev_accuracy if self.dev_f1 is None else self.dev_f1
        return self.stopped is not None, -score, math.inf if self.dev_loss is None else self.dev_loss


def new_plan(
    *, out: str, lr: tuple[float, ...] | None, eps: tuple[float, ...] | None, stop_margin: float, **settings: Any
) -> Plan:
    """Make a plan. `settings` are those of `Config`, except that `lr` and `eps` are several (None for the default).

    Raises ValueError if the settings of a run are wrong.
    """
    return _checked(Plan(out, settings, lr or (None,), eps or (Config.eps,), stop_margin))


def _checked(plan: Plan) -> Plan:
    if not 0 < plan.stop_margin < math.inf:
        raise ValueError(f"--stop-margin: expected a finite number above 0, got {plan.stop_margin}")
    if AUTO in plan.lr:
        raise ValueError(f"--lr: expected numbers in a sweep, got {AUTO}, which finds one rate for a run alone")
    for option, values in (("--lr", plan.lr), ("--eps", plan.eps)):
        if not 0 < len(set(values)) == len(values) <= _MOST_RUNS:
            raise ValueError(f"{option}: expected 1 to {_MOST_RUNS} different numbers, got {len(values)}")
    if (runs := len(plan.lr) * len(plan.eps)) > _MOST_RUNS:
        raise ValueError(f"--lr, --eps: expected at most {_MOST_RUNS} combinations, got {runs}")
    plan.configs()
    return plan


def plan_of(folder: str | Path) -> Plan:
    """Read the plan of a sweep. `out` is where its folder is now. Raises ValueError if there is no sound plan."""
    path = Path(folder) / PLAN
    try:
        values = run_folder.unmarked(path, schema.read_json(path)) or {}
        values = schema.check(str(path), values, {"plan": dict, "runs": list})
        plan = schema.check(f"{path}: plan", values["plan"], _HINTS)
        hints = {name: hint for name, hint in get_type_hints(Config).items() if name not in ("out", "lr", "eps")}
        settings = schema.check(f"{path}: plan: settings", plan["settings"], hints, hints.keys())
        return _checked(Plan(str(folder), settings, plan["lr"], plan["eps"], plan["stop_margin"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume: expected the folder of a sweep, with its {PLAN}: {error}") from error


def is_sweep(folder: Path) -> bool:
    """Whether the folder certainly holds a sweep of zo-finetune: its plan is marked, or has the fields of a plan.

    Raises ValueError or OSError if the plan cannot be read.
    """
    path = folder / PLAN
    if not os.path.lexists(path):
        return False
    values = run_folder.unmarked(path, schema.read_json(path))
    plan = {} if values is None else values.get("plan")
    return values is None or (isinstance(plan, dict) and plan.keys() == _HINTS.keys())


SWEEP = Kind("a sweep", (PLAN, TABLE), (), is_sweep)


def result_of(config: Config) -> Result | None:
    """The result of a run. None if it was cut off in training."""
    records = records_of(Path(str(config.out)))
    trained = next((r for r in records if r["event"] == "trained"), None)
    if trained is None:
        return None
    dev = [r for r in records if r["event"] == "evaluation" and r["split"] == "dev"][-1]
    assert not isinstance(config.lr, str)
    return Result(
        lr=config.lr,
        eps=config.eps,
        steps=trained["step"],
        dev_loss=dev["loss"] if math.isfinite(dev["loss"]) else None,
        dev_accuracy=dev["accuracy"],
        dev_f1=dev.get("f1"),
        stopped=trained["stopped"],
        folder=Path(str(config.out)).name,
    )


def write(plan: Plan, results: list[Result]) -> None:
    """Write the plan and the results so far, best first, to `sweep.json` and `sweep.csv`."""
    ranked = [asdict(result) for result in sorted(results, key=lambda result: result.rank)]
    run_folder.write_json(plan.folder / PLAN, run_folder.marked({"plan": asdict(plan), "runs": ranked}))
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Result)], lineterminator="\n")
    table.writeheader()
    table.writerows(ranked)
    files.replace(plan.folder / TABLE, text.getvalue().encode())


def write_mark(plan: Plan) -> None:
    """Write only the mark: the sweep in the folder is about to be replaced."""
    run_folder.write_json(plan.folder / PLAN, run_folder.marked({}))
