"""Do several runs that differ in learning rate and perturbation scale, and pick the best."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zo_kernels import files
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.folders import claims, run_folder
from zo_kernels.finetune.learner import Learner
from zo_kernels.finetune.runs import train
from zo_kernels.finetune.runs.job import Job, prepare_learner, prepare_run
from zo_kernels.finetune.sweeps.plan import PLAN, SWEEP, Plan, Result, result_of, write, write_mark


def run(plan: Plan, console: Console, *, resumed: bool = False, recover: bool = False) -> Result | None:
    """Do the runs of a sweep, resume those that were cut off, and print a table of all.

    `recover` goes on with damaged runs as `train.resume` does.

    Returns the best run, which alone is evaluated on the test and has its model saved; None if all runs were stopped.

    Raises ValueError, TypeError or OSError if the settings, the data, the model or a folder cannot be used.
    """
    configs = plan.configs()
    if resumed:
        claims.check_written(plan.folder, SWEEP)
        with claims.lock(plan.folder, SWEEP):
            return _run(plan, configs, _Shared(configs, resumed, recover), console)
    _check_folder(plan, configs)
    shared = _Shared(configs, resumed, recover)
    _ = shared.start  # before anything is written, so that a sweep that cannot start leaves nothing behind
    with _made(plan, configs):
        return _run(plan, configs, shared, console)


def _run(plan: Plan, configs: list[Config], shared: _Shared, console: Console) -> Result | None:
    results: list[Result] = []
    for number, config in enumerate(configs, 1):
        console.print(f"run {number} of {len(configs)}: lr {config.lr}, eps {config.eps}", highlight=False)
        folder = Path(str(config.out))
        begun = run_folder.started(folder)
        if begun:
            _check_settings(folder, config)
        if (result := result_of(config) if begun else None) is None:
            train.train_only(shared.job(config, resume=begun), console, plan.rule, resumed=begun)
            result = result_of(config)
            assert result is not None
        results.append(result)
        write(plan, results)
    best = min(results, key=lambda result: result.rank)
    config = configs[results.index(best)]
    if best.stopped is None and not run_folder.finished(Path(str(config.out))):
        console.print(f"testing the best run: {best.folder}", highlight=False)
        train.run(shared.job(config, resume=True), console, time.perf_counter(), resumed=True)
    console.print(_table(results))
    console.print(f"sweep folder: {plan.out}", highlight=False, soft_wrap=True)
    if best.stopped is not None:
        return None
    console.print("To repeat the best run, perhaps with other --steps or --seed:", highlight=False)
    console.print("  " + plan.command(config), highlight=False, soft_wrap=True)
    return best


class _Shared:
    """Data and model, prepared once for all runs. Every run starts from the same weights, bit for bit."""

    def __init__(self, configs: list[Config], resumed: bool, recover: bool) -> None:
        self._configs, self._resumed, self._recover = configs, resumed, recover

    @cached_property
    def learner(self) -> Learner:
        folders = [Path(str(config.out)) for config in self._configs if self._resumed]
        return prepare_learner(self._configs[0], next(filter(run_folder.begun, folders), None))

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """A copy of the weights before training, on the CPU."""
        return {name: value.cpu().clone() for name, value in self.learner.predictor.model.state_dict().items()}

    def job(self, config: Config, *, resume: bool) -> Job:
        """Prepare a run, with the weights of the start."""
        with torch.no_grad():
            for name, value in self.learner.predictor.model.state_dict().items():
                value.copy_(self.start[name])
        return prepare_run(config, self.learner, resume=resume, recover=self._recover)


def _check_folder(plan: Plan, configs: list[Config]) -> None:
    """Raise ValueError unless the folder can be written and is new, empty, or a sweep to be overwritten."""
    read, overwrite = claims.sources(configs[0]), configs[0].overwrite
    claims.check_new(plan.out, SWEEP, read, overwrite=overwrite, hint=" (or add --overwrite)")
    for config in configs:
        claims.check_run(config)


def _made(plan: Plan, configs: list[Config]) -> files.Locked:
    """Create the folder of the sweep, delete an earlier sweep in it, and write the plan. Returns its lock."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    held = claims.lock(plan.folder, SWEEP)
    try:
        _check_folder(plan, configs)  # another process may have been faster
        if (plan.folder / PLAN).exists():
            write_mark(plan)
        for config in configs:
            # Otherwise a run of an earlier sweep would be taken for one of this sweep.
            claims.clear(Path(str(config.out)))
        write(plan, [])
    except BaseException:
        held.release()
        raise
    return held


def _check_settings(folder: Path, config: Config) -> None:
    """Raise ValueError if the settings of a run are not those of the plan."""
    theirs, ours = vars(run_folder.config_of(folder)), vars(config)
    for name in ours.keys() - {"out", "overwrite"}:
        if theirs[name] != ours[name]:
            raise ValueError(
                f"{folder / run_folder.CONFIG}: {name}: expected {ours[name]!r}, as in {PLAN} of the sweep, got "
                f"{theirs[name]!r}"
            )


def _table(results: list[Result]) -> Table:
    metric = "dev accuracy" if results[0].dev_f1 is None else "dev F1"
    table = Table(title="sweep, best run first", title_justify="left")
    for column in ("lr", "eps", "steps", "dev loss", metric):
        table.add_column(column, justify="right")
    table.add_column("stopped")
    for result in sorted(results, key=lambda result: result.rank):
        loss = "" if result.dev_loss is None else f"{result.dev_loss:.3f}"
        score = result.dev_accuracy if result.dev_f1 is None else result.dev_f1
        row = str(result.lr), str(result.eps), str(result.steps), loss, f"{score:.3f}", result.stopped or ""
        table.add_row(*row)
    return table
