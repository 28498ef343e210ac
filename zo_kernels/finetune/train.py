"""The training loop: steps, recorded, and evaluated from time to time."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

import zo_kernels as zo
from zo_kernels.finetune import report, run_folder
from zo_kernels.finetune.batches import Texts
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.job import Job, prepare
from zo_kernels.finetune.model import Classifier
from zo_kernels.finetune.results import Evaluation, Summary
from zo_kernels.finetune.run_folder import Metrics
from zo_kernels.finetune.steps import Step, Stepper

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


def run(job: Job, console: Console, started: float) -> Summary:
    """Evaluate, train, evaluate and save; `started` is the `time.perf_counter()` from which the run is timed."""
    with Metrics(job.folder) as metrics:
        start = _start(job)
        metrics.write("start", **start)
        for line in report.opening_lines(start):
            console.print(line, highlight=False, soft_wrap=True)
        before = _evaluate(job, metrics, "test", 0)
        steps = _train(job, metrics, console)
        after = _evaluate(job, metrics, "test", len(steps))
        run_folder.save_classifier(job.folder, job.classifier, job.tokenizer, job.names, job.config.max_tokens)
        report.draw_curves(metrics.records, job.folder / run_folder.CURVES)
        in_steps = sum(step.seconds for step in steps)
        summary = Summary(
            before=before,
            after=after,
            steps=len(steps),
            step_seconds=in_steps / len(steps),
            forward_share=sum(step.forward_seconds for step in steps) / in_steps,
            pass_share=sum(step.pass_seconds for step in steps) / in_steps,
            refused_steps=job.optimizer.refused_steps,
            peak_rss=report.peak_rss(),
            seconds=time.perf_counter() - started,
            test_texts=len(job.test),
        )
        metrics.write("summary", **asdict(summary))
    console.print(report.closing_table(summary))
    if after.loss > before.loss:
        console.print("The loss rose: a lower --lr may help.")
    console.print(f"run folder: {job.folder}", highlight=False, soft_wrap=True)
    return summary


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
    batches = job.train.endless(config.batch_size, torch.Generator().manual_seed(config.seed))
    stepper = Stepper(config, job.classifier, job.optimizer, batches)
    steps: list[Step] = []
    in_forwards = in_steps = 0.0
    dev = _evaluate(job, metrics, "dev", 0)
    console.print(_evaluation_line(0, dev), highlight=False)
    with _progress(console) as progress:
        task = progress.add_task(config.method, total=config.steps, status="")
        for number in range(1, config.steps + 1):
            step = stepper.step(_schedule(config.schedule, (number - 1) / config.steps))
            steps.append(step)
            metrics.write("step", step=number, **asdict(step))
            _give_up_if_diverged(steps, config)
            if number % config.eval_every == 0 or number == config.steps:
                dev = _evaluate(job, metrics, "dev", number)
                progress.console.print(_evaluation_line(number, dev), highlight=False)
            in_forwards, in_steps = in_forwards + step.forward_seconds, in_steps + step.seconds
            progress.update(task, advance=1, status=_status(step, dev, in_forwards / in_steps))
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
    start = time.perf_counter()
    result = evaluate(job.classifier, {"dev": job.dev, "test": job.test}[split])
    metrics.write("evaluation", split=split, step=step, **asdict(result), seconds=time.perf_counter() - start)
    return result


def _progress(console: Console) -> Progress:
    text = TextColumn("{task.description}"), TextColumn("{task.fields[status]}")
    return Progress(text[0], BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn(), text[1], console=console)


def _status(step: Step, dev: Evaluation, share: float) -> str:
    loss = "refused" if step.loss is None else f"{step.loss:.3f}"
    return f"loss {loss} acc {dev.accuracy:.3f} forwards {share:.0%} passes {1 - share:.0%}"


def _evaluation_line(step: int, dev: Evaluation) -> str:
    return f"step {step:5d}  dev loss {dev.loss:.3f}  dev accuracy {dev.accuracy:.3f}"
