"""Which runs a sweep has, and what came of them."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from zo_kernels.finetune import run_folder
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.stopping import StopRule

PLAN, TABLE = "sweep.json", "sweep.csv"


@dataclass(frozen=True)
class Plan:
    """A run of the other settings for every combination of learning rates and scales."""

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
        """Of every run. Raises ValueError as `Config` does."""
        configs = [Config(**self.settings, lr=lr, eps=eps) for lr in self.lr for eps in self.eps]
        for config in configs:
            config.out = str(self.folder / f"lr-{config.lr}-eps-{config.eps}")
        return configs

    def command(self, config: Config) -> str:
        """The command line of one of the runs, by itself."""
        defaults = {field.name: field.default for field in fields(Config)}
        chosen = {**self.settings, "lr": config.lr, "eps": config.eps, "overwrite": False, "out": f"{self.out}-again"}
        words = ["zo-finetune"]
        for name, value in chosen.items():
            if value != defaults[name]:
                words += ["--" + name.replace("_", "-"), str(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Result:
    """What came of a run, at its last evaluation on the development examples.

    `dev_loss` is None if it was not finite, `stopped` tells why the run was stopped, None if it was not.
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
        """The smallest is the best: of those that went to their end the one that scores highest, then the loss."""
        score = self.dev_accuracy if self.dev_f1 is None else self.dev_f1
        return self.stopped is not None, -score, math.inf if self.dev_loss is None else self.dev_loss


def new_plan(
    *, out: str, lr: tuple[float, ...] | None, eps: tuple[float, ...] | None, stop_margin: float, **settings: Any
) -> Plan:
    """A plan whose settings are those of `Config`, but for several `lr` and `eps` (None: the default one).

    Raises ValueError if one of the runs could not be.
    """
    if not 0 < stop_margin < math.inf:
        raise ValueError(f"--stop-margin: expected a finite number above 0, got {stop_margin}")
    plan = Plan(out, settings, lr or (None,), eps or (Config.eps,), stop_margin)
    plan.configs()
    return plan


def plan_of(folder: str | Path) -> Plan:
    """The plan of a sweep that has begun, `out` being where its folder is now. Raises ValueError if there is none."""
    try:
        plan = json.loads((Path(folder) / PLAN).read_text(encoding="utf-8"))["plan"]
        return Plan(str(folder), plan["settings"], tuple(plan["lr"]), tuple(plan["eps"]), plan["stop_margin"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: expected the folder of a sweep, with its {PLAN}: {error!r}") from error


def result_of(config: Config) -> Result | None:
    """What came of a run, None if it has not been trained to its end or to where it was stopped."""
    records = run_folder.records_of(Path(str(config.out)))
    trained = next((r for r in records if r["event"] == "trained"), None)
    if trained is None:
        return None
    dev = [r for r in records if r["event"] == "evaluation" and r["split"] == "dev"][-1]
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
    """The plan and the results so far, best first, as `sweep.json` and `sweep.csv`."""
    ranked = [asdict(result) for result in sorted(results, key=lambda result: result.rank)]
    run_folder.write_json(plan.folder / PLAN, {"plan": asdict(plan), "runs": ranked})
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Result)], lineterminator="\n")
    table.writeheader()
    table.writerows(ranked)
    run_folder.write_whole(plan.folder / TABLE, text.getvalue())
