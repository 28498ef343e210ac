"""The training loop: start a run or resume one, take its steps, record and evaluate them."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zo_kernels import files
from zo_kernels.finetune import ending
from zo_kernels.finetune.classifier.learner import evaluate as evaluate  # for the benchmarks
from zo_kernels.finetune.config import AUTO, Config
from zo_kernels.finetune.folders import run_folder
from zo_kernels.finetune.folders.metrics import Evaluation, Metrics, Step, Summary
from zo_kernels.finetune.runs import rate, report
from zo_kernels.finetune.runs.job import Job, prepare, record_start, resume_weights
from zo_kernels.finetune.runs.steps import Stepper
from zo_kernels.finetune.runs.stopping import StopRule
from zo_kernels.trajectory import Kind

_MOST_REFUSED_IN_A_ROW = 20


class Diverged(RuntimeError):
    """Too many steps in a row were refused: the run has diverged."""


def finetune(config: Config, console: Console | None = None) -> Summary:
    """Train as `config` says, write the run folder, and print progress and a closing table. Returns the outcome.

    Raises ValueError, TypeError or OSError before the first step if the settings, the data or the model cannot be used,
    and `Diverged` if 20 steps in a row were refused.
    """
    started = time.perf_counter()
    return run(prepare(config), console or Console(), started)


def resume(folder: str | Path, console: Console | None = None, *, recover: bool = False) -> Summary:
    """Resume a run that was cut off at any moment. It ends with the same bits as a run that was not cut off.

    With `recover`, the run goes on from the sound part of damaged files, and copies of these are kept.

    Raises ValueError, TypeError or OSError if the folder has no unfinished run, or if data, model or versions have
    changed since its start, and `Diverged` as `finetune` does.
    """
    started = time.perf_counter()
    return run(prepare_to_resume(folder, recover=recover), console or Console(), started, resumed=True)


def prepare_to_resume(folder: str | Path, *, recover: bool = False) -> Job:
    """Prepare to resume a run that was cut off. Its weights are still those of its start.

    Raises ValueError, TypeError or OSError as `resume` does.
    """
    config = run_folder.config_of(folder)
    if run_folder.finished(Path(folder)):
        raise ValueError(f"--resume: expected a run that was cut off, got {folder}, whose run has finished")
    return prepare(config, resume=True, recover=recover)


def run(job: Job, console: Console, started: float, *, resumed: bool = False) -> Summary:
    """Evaluate, train, evaluate and save. The run is timed from `started`, a value of `time.perf_counter()`."""
    with job.lock, Metrics(job.folder, resumed=resumed, recover=job.recover) as metrics:
        for line in report.opening_lines(record_start(job, metrics)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        before = _evaluated(job, metrics, console, "test", 0)
        _evaluated(job, metrics, console, "dev", 0)
        lr = _found_rate(job, metrics, console) if job.config.lr == AUTO else None
        if resumed:
            _resume(job, metrics, console)
        if lr is not None:
            _set_rate(job, lr)
        steps, _ = _train(job, metrics, console)
        after = _evaluated(job, metrics, console, "test", len(steps))
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
            test_texts=len(job.learner.test),
        )
        metrics.write("summary", **summary.as_record())
        # Last, since a saved model marks a finished run.
        job.learner.predictor.save(job.folder)
    console.print(report.closing_table(summary))
    if after.loss > before.loss:
        console.print("The loss rose: a lower --lr may help.")
    console.print(f"run folder: {job.folder}", highlight=False, soft_wrap=True)
    return summary


def train_only(job: Job, console: Console, rule: StopRule, *, resumed: bool = False) -> None:
    """Train to the end or until `rule` stops the run, without the test and without saving the model.

    The last record of the metrics is then "trained", with the last step and the reason if the run was stopped.
    `run(..., resumed=True)` continues from there, or evaluates on the test and saves the model.
    """
    with job.lock, Metrics(job.folder, resumed=resumed, recover=job.recover) as metrics:
        for line in report.opening_lines(record_start(job, metrics)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        _evaluated(job, metrics, console, "dev", 0)
        if resumed:
            _resume(job, metrics, console)
        steps, stopped = _train(job, metrics, console, rule)
        report.draw_curves(metrics.records, job.folder / run_folder.CURVES)
        metrics.write("trained", step=len(steps), stopped=stopped)


def _found_rate(job: Job, metrics: Metrics, console: Console) -> float:
    """The learning rate of `--lr auto`. If it was found before the run was cut off, that one.

    The weights must be those of the start, and stay so.
    """
    record = metrics.find("lr")
    if record is None:
        with _progress(console, transient=True) as progress, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", "find_lr: ")  # the line below says it
            bar = progress.add_task("finding lr, forwards", total=None, status="")
            found = rate.find(job, lambda: progress.advance(bar))
        for warning in caught:
            console.print(f"warning: {warning.message}", highlight=False, markup=False, soft_wrap=True)
        metrics.write("lr", **rate.as_record(found))
        record = metrics.records[-1]
    if not (picture := job.folder / run_folder.RATES).exists():
        report.draw_rates(record, picture)
    console.print(report.rate_line(record, rate.forwards_of_run(job.config)), highlight=False, soft_wrap=True)
    return float(record["lr"])


def _set_rate(job: Job, lr: float) -> None:
    for group in job.optimizer.param_groups:
        group["lr"] = lr


def _resume(job: Job, metrics: Metrics, console: Console) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume_weights(job, metrics.reached)
    for warning in caught:
        console.print(f"warning: {warning.message}", highlight=False, markup=False, soft_wrap=True)
    if (copy := metrics.begin(job.optimizer.step_count)) is not None:
        said = (
            f"warning: {run_folder.METRICS} had damaged lines or steps that are lost; its old content is kept as {copy}"
        )
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    metrics.write("resume", step=job.optimizer.step_count)
    console.print(f"resumed after step {job.optimizer.step_count}", highlight=False)


def _train(job: Job, metrics: Metrics, console: Console, rule: StopRule | None = None) -> tuple[list[Step], str | None]:
    """The steps of the run, and why `rule` stopped it, else None. Without a rule, a run that diverges raises."""
    config = job.config
    stepper = Stepper(config, job.learner, job.optimizer)
    ending.steps_begin()
    steps = _steps_so_far(job, metrics)
    losses = [step.loss for step in steps]
    in_forwards, in_steps = sum(step.forward_seconds for step in steps), sum(step.seconds for step in steps)
    dev = dev_before = _evaluated(job, metrics, console, "dev", 0)
    console.print(_evaluation_line(0, dev), highlight=False)
    with _progress(console) as progress:
        task = progress.add_task(config.method, total=config.steps, completed=len(steps), status="")
        while True:
            number = len(steps)
            if number and (number % config.eval_every == 0 or number == config.steps):
                dev = _evaluate(job, metrics, "dev", number, progress)
                files.sync(job.folder / run_folder.TRAJECTORY)  # steps up to here survive a power cut
                progress.console.print(_evaluation_line(number, dev), highlight=False)
            if rule and (stopped := rule.reason(losses, dev_before.loss, dev.loss)) is not None:
                return steps, stopped
            if number == config.steps:
                return steps, None
            step = stepper.step(_schedule(config.schedule, number / config.steps))
            steps.append(step)
            losses.append(step.loss)
            # Wait for the trajectory: on a GPU it is written later, but a step must be in it before it is in the
            # metrics.
            _ = job.optimizer.trajectory
            metrics.write("step", step=number + 1, **asdict(step))
            if rule is None:
                _give_up_if_diverged(steps, config)
            in_forwards, in_steps = in_forwards + step.forward_seconds, in_steps + step.seconds
            progress.update(task, advance=1, status=_status(step, dev, in_forwards / in_steps))


def _steps_so_far(job: Job, metrics: Metrics) -> list[Step]:
    """The steps of a resumed run. The last one may be missing in the metrics; it is added without its times."""
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
            f"the last {len(last)} of {len(steps)} steps were refused, since a loss was not finite or the update too "
            f"large for the weights: the run has diverged. Lower --lr, got {steps[0].lr}, --eps, got {config.eps}, or "
            f"--weight-decay, got {config.weight_decay}"
        )


def _schedule(name: str, progress: float) -> float:
    """The factor of the learning rates after the fraction `progress` of the steps."""
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[name]


def _evaluated(job: Job, metrics: Metrics, console: Console, split: str, step: int) -> Evaluation:
    """Evaluate with a progress bar that disappears at the end."""
    with _progress(console, transient=True) as progress:
        return _evaluate(job, metrics, split, step, progress)


def _evaluate(job: Job, metrics: Metrics, split: str, step: int, progress: Progress) -> Evaluation:
    """Evaluate a split after a step. If it was evaluated before the run was cut off, return that result."""
    if (known := metrics.find("evaluation", split=split, step=step)) is not None:
        return Evaluation(known["loss"], known["accuracy"], known.get("f1"))
    start = time.perf_counter()
    examples = job.learner.splits[split]
    bar = progress.add_task(f"evaluating {split}", total=len(examples), status="")
    result = job.learner.evaluate(examples, lambda count: progress.advance(bar, count))
    progress.remove_task(bar)
    metrics.write("evaluation", split=split, step=step, **result.as_record(), seconds=time.perf_counter() - start)
    return result


def _progress(console: Console, *, transient: bool = False) -> Progress:
    text = TextColumn("{task.description}"), TextColumn("{task.fields[status]}")
    columns = text[0], BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn(), text[1]
    # Where output cannot be erased, a transient bar would leave an empty line.
    return Progress(*columns, console=console, transient=transient, disable=transient and not console.is_terminal)


def _status(step: Step, dev: Evaluation, share: float) -> str:
    loss = "refused" if step.loss is None else f"{step.loss:.3f}"
    return f"loss {loss}, dev {dev.metric[:3]} {dev.score:.3f}, forwards {share:.0%}"


def _evaluation_line(step: int, dev: Evaluation) -> str:
    return f"step {step:5d}  dev loss {dev.loss:.3f}  dev {dev.metric} {dev.score:.3f}"
