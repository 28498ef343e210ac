"""The training loop: steps, recorded, and evaluated from time to time."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

import zo_kernels as zo
from zo_kernels.finetune import report, run_folder
from zo_kernels.finetune.batches import Texts
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.job import Job, prepare, resume_weights
from zo_kernels.finetune.model import Classifier
from zo_kernels.finetune.results import Evaluation, Summary
from zo_kernels.finetune.run_folder import Metrics
from zo_kernels.finetune.steps import Step, Stepper
from zo_kernels.trajectory import Kind

_MOST_REFUSED_IN_A_ROW = 20
_EVALUATION_BATCH = 64


class Diverged(RuntimeError):
    """So many steps in a row were refused that going on is pointless."""


def finetune(config: Config, console: Console | None = None) -> Summary:
    """Do the run that `config` describes, write its folder and print its progress and closing table.

    Raises ValueError, TypeError or OSError, before the first step, for settings, data or a model that cannot be used;
    `Diverged` if 20 steps in a row had a loss that was not finite.
    """
    started = time.perf_counter()
    return run(prepare(config), console or Console(), started)


def resume(folder: str | Path, console: Console | None = None) -> Summary:
    """Go on with a run that was cut off, at whatever moment; it ends with the bits of one that was not.

    Raises ValueError, TypeError or OSError if the folder is not that of an unfinished run, or if data, model or
    versions are not those that it was started with; `Diverged` as `finetune`.
    """
    started = time.perf_counter()
    return run(prepare_to_resume(folder), console or Console(), started, resumed=True)


def prepare_to_resume(folder: str | Path) -> Job:
    """The job of a run that was cut off, with the weights that it started with.

    Raises ValueError, TypeError or OSError as `resume`.
    """
    config = run_folder.config_of(folder)
    if (Path(folder) / run_folder.MODEL / run_folder.LABELS).is_file():
        raise ValueError(f"--resume: expected a run that was cut off, got {folder}, which has finished")
    return prepare(config, resume=True)


def run(job: Job, console: Console, started: float, *, resumed: bool = False) -> Summary:
    """Evaluate, train, evaluate and save; `started` is the `time.perf_counter()` from which the run is timed."""
    with Metrics(job.folder, _steps_recorded(job) if resumed else None) as metrics:
        start = _start(job)
        _check_same_start(metrics.find("start"), start)
        if metrics.find("start") is None:
            metrics.write("start", **start)
        for line in report.opening_lines(start):
            console.print(line, highlight=False, soft_wrap=True)
        before = _evaluate(job, metrics, "test", 0)
        _evaluate(job, metrics, "dev", 0)
        if resumed:
            resume_weights(job)
            metrics.write("resume", step=job.optimizer.step_count)
            console.print(f"resumed after step {job.optimizer.step_count}", highlight=False)
        steps = _train(job, metrics, console)
        after = _evaluate(job, metrics, "test", len(steps))
        report.draw_curves(metrics.records, job.folder / run_folder.CURVES)
        timed = [step for step in steps if step.seconds]
        in_steps = sum(step.seconds for step in timed) or math.nan
        summary = Summary(
            before=before,
            after=after,
            steps=len(steps),
            step_seconds=in_steps / max(len(timed), 1),
            forward_share=sum(step.forward_seconds for step in timed) / in_steps,
            pass_share=sum(step.pass_seconds for step in timed) / in_steps,
            refused_steps=job.optimizer.refused_steps,
            peak_rss=report.peak_rss(),
            seconds=time.perf_counter() - started,
            test_texts=len(job.test),
        )
        metrics.write("summary", **asdict(summary))
        # Last: a run that has this has finished.
        run_folder.save_classifier(job.folder, job.classifier, job.tokenizer, job.names, job.config.max_tokens)
    console.print(report.closing_table(summary))
    if after.loss > before.loss:
        console.print("The loss rose: a lower --lr may help.")
    console.print(f"run folder: {job.folder}", highlight=False, soft_wrap=True)
    return summary


def _steps_recorded(job: Job) -> int:
    trajectory = job.folder / run_folder.TRAJECTORY
    return zo.Trajectory.load(trajectory, recover=True).steps if trajectory.exists() else 0


def _check_same_start(before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Other data, and other versions of what computes the losses, would give other bits."""
    changed = {} if before is None else {k: (before.get(k), v) for k, v in now.items() if before.get(k) != v}
    if changed:
        told = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
        raise ValueError(f"--resume: expected what the run was started with: {told}")


def _start(job: Job) -> dict[str, Any]:
    config, parameters = job.config, list(job.classifier.parameters())
    return {
        "model": config.model or "all-MiniLM-L6-v2",
        "data": config.data or "docstrings of the standard library",
        "method": config.method,
        "dtype": config.dtype,
        "labels": list(job.names),
        "train": len(job.train),
        "dev": len(job.dev),
        "test": len(job.test),
        "cut": job.train.cut + job.dev.cut + job.test.cut,
        "max_tokens": config.max_tokens,
        "texts": [texts.digest() for texts in (job.train, job.dev, job.test)],
        "perturb": job.optimizer.perturb,
        "weights": sum(p.numel() for p in parameters),
        "weights_trained": sum(p.numel() for p in parameters if p.requires_grad),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zo_kernels": zo.__version__,
    }


@torch.no_grad()
def evaluate(classifier: Classifier, texts: Texts) -> Evaluation:
    """Loss and accuracy over all texts."""
    loss, right = 0.0, 0
    for batch in texts.in_order_of_length(_EVALUATION_BATCH):
        logits = classifier(batch.input_ids, batch.attention_mask)
        loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        right += int((logits.argmax(1) == batch.labels).sum())
    return Evaluation(loss / len(texts), right / len(texts))


def _train(job: Job, metrics: Metrics, console: Console) -> list[Step]:
    config = job.config
    stepper = Stepper(config, job.classifier, job.optimizer, job.train)
    steps = _steps_so_far(job, metrics)
    in_forwards, in_steps = sum(step.forward_seconds for step in steps), sum(step.seconds for step in steps)
    dev = _evaluate(job, metrics, "dev", 0)
    console.print(_evaluation_line(0, dev), highlight=False)
    with _progress(console) as progress:
        task = progress.add_task(config.method, total=config.steps, completed=len(steps), status="")
        while True:
            number = len(steps)
            if number and (number % config.eval_every == 0 or number == config.steps):
                dev = _evaluate(job, metrics, "dev", number)
                progress.console.print(_evaluation_line(number, dev), highlight=False)
            if number == config.steps:
                return steps
            step = stepper.step(_schedule(config.schedule, number / config.steps))
            steps.append(step)
            metrics.write("step", step=number + 1, **asdict(step))
            _give_up_if_diverged(steps, config)
            in_forwards, in_steps = in_forwards + step.forward_seconds, in_steps + step.seconds
            progress.update(task, advance=1, status=_status(step, dev, in_forwards / in_steps))


def _steps_so_far(job: Job, metrics: Metrics) -> list[Step]:
    """Those of a run that is resumed. The last may be in the trajectory alone, without its times."""
    known = {r["step"]: r for r in metrics.records if r["event"] == "step"}
    steps: list[Step] = []
    for record in job.optimizer.trajectory:
        if record.kind is Kind.INTERRUPTED:
            continue
        number = len(steps) + 1
        if number not in known:
            lr = record.rates[0] if record.rates else job.optimizer.param_groups[0]["lr"]
            untimed = Step(record.loss, lr, seconds=0.0, forward_seconds=0.0, pass_seconds=0.0, batch_seconds=0.0)
            metrics.write("step", step=number, **asdict(untimed))
            known[number] = asdict(untimed)
        steps.append(Step(**{field.name: known[number][field.name] for field in fields(Step)}))
    return steps


def _give_up_if_diverged(steps: Sequence[Step], config: Config) -> None:
    last = steps[-_MOST_REFUSED_IN_A_ROW:]
    if len(last) == _MOST_REFUSED_IN_A_ROW and all(step.loss is None for step in last):
        raise Diverged(
            f"the last {len(last)} of {len(steps)} steps had a loss that is not finite: the run has diverged. "
            f"Lower --lr, got {config.lr}, or --eps, got {config.eps}"
        )


def _schedule(name: str, progress: float) -> float:
    """The factor of the learning rates when a share `progress` of the steps is done."""
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[name]


def _evaluate(job: Job, metrics: Metrics, split: str, step: int) -> Evaluation:
    """After a step; what has been evaluated already, before the run was cut off, is looked up."""
    if (known := metrics.find("evaluation", split=split, step=step)) is not None:
        return Evaluation(known["loss"], known["accuracy"])
    start = time.perf_counter()
    result = evaluate(job.classifier, {"dev": job.dev, "test": job.test}[split])
    metrics.write("evaluation", split=split, step=step, **asdict(result), seconds=time.perf_counter() - start)
    return result


def _progress(console: Console) -> Progress:
    text = TextColumn("{task.description}"), TextColumn("{task.fields[status]}")
    return Progress(text[0], BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn(), text[1], console=console)


def _status(step: Step, dev: Evaluation, share: float) -> str:
    loss = "refused" if step.loss is None else f"{step.loss:.3f}"
    return f"loss {loss}, dev acc {dev.accuracy:.3f}, forwards {share:.0%}"


def _evaluation_line(step: int, dev: Evaluation) -> str:
    return f"step {step:5d}  dev loss {dev.loss:.3f}  dev accuracy {dev.accuracy:.3f}"
