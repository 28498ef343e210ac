"""How zo-finetune ends when the disk is full, by signals, and over damaged files; and how it goes on, bit for bit."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
for module in ("rich", "matplotlib", "safetensors"):
    pytest.importorskip(module)

from tiny_run import tiny_encoder, tiny_options, write_table  # noqa: E402

import zo_kernels as zo  # noqa: E402
from zo_kernels.finetune import cli  # noqa: E402
from zo_kernels.finetune.folders.metrics import records_of  # noqa: E402
from zo_kernels.finetune.runs import report, train  # noqa: E402

Options = dict[str, Any]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which take longer than all the rest."""
    monkeypatch.setattr(report, "draw_curves", lambda records, path: zo.files.replace(path, b""))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_options(tiny_encoder(folder / "tiny"), write_table(folder / "words.tsv")) | {"eval_every": 2}


def arguments(options: Options, out: Path, *more: str) -> list[str]:
    return [*(f"--{name.replace('_', '-')}={value}" for name, value in options.items()), f"--out={out}", *more]


def outcome(out: Path) -> dict[str, Any]:
    """What must not depend on how a run came to its end."""
    records = records_of(out)
    return {
        "weights": {path.name: path.read_bytes() for path in sorted((out / "model").glob("*.safetensors"))},
        "steps": [(r.kind, r.losses, r.rates) for r in zo.Trajectory.load(out / "trajectory.zo")],
        "losses": [(r["step"], r["lr"]) for r in records if r["event"] == "step"],
        "evaluations": [(r["step"], r["split"], r["loss"]) for r in records if r["event"] == "evaluation"],
    }


def whole(options: Options, folder: Path) -> Path:
    out = folder / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_curves", lambda records, path: zo.files.replace(path, b""))
        assert cli.main(arguments(options, out)) == 0
    return out


@pytest.fixture(scope="module")
def left_alone(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(options, tmp_path_factory.mktemp("whole"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class FullDisk:
    """A disk that is full from its so many-th operation on, until the block ends: a write then ends half way."""

    def __init__(self, operation: int, code: int) -> None:
        self.left, self.code, self.patch = operation, code, pytest.MonkeyPatch()

    def __enter__(self) -> FullDisk:
        for name in ("open", "write", "mkdir", "replace", "fsync"):
            self.patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        for owner, text in (
            (transformers.PreTrainedModel, "Error while serializing: I/O error: Os { code: %d, kind: StorageFull }"),
            (transformers.PreTrainedTokenizerBase, "No space left on device (os error %d)"),
        ):
            self.patch.setattr(owner, "save_pretrained", self._wrapped(text, owner.save_pretrained))
        return self

    def __exit__(self, *exception: object) -> None:
        self.patch.undo()

    def _wrapped(self, name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*given: Any, **options: Any) -> Any:
            if name == "open" and not given[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return do(*given, **options)
            self.left -= 1
            if self.left >= 0:
                return do(*given, **options)
            if name == "write":
                half = len(given[1]) // 2
                if self.left == -1 and half:
                    return do(given[0], bytes(given[1])[:half])
            if "%d" in name:
                raise Exception(name % self.code)
            raise OSError(self.code, os.strerror(self.code), str(given[0]))

        return operation


def full_at(options: Options, out: Path, operation: int, said: Callable[[], str]) -> bool:
    """A run on a disk that is full from an operation on, and gone on with when there is room; whether it came to that.

    `said` returns what went to stderr since it was called before.
    """
    said()
    with FullDisk(operation, FULL[operation % len(FULL)]) as disk:
        code = cli.main(arguments(options, out))
    if code == 0:  # all was on the disk by then; what failed is to sync the trajectory once more, as it is let go of
        return disk.left < 0
    (line,) = (line for line in said().splitlines() if line.startswith("zo-finetune:"))
    assert code == 1, operation
    if "start it again" in line or "nothing was written" in line:
        assert not (out / "config.json").exists()
        assert cli.main(arguments(options, out)) == 0
    elif "the run has finished" not in line:
        assert f"continue with: zo-finetune --resume {out}" in line, line
        assert cli.main(["--resume", str(out)]) == 0
    return True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from finalizers of the optimizer
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_ends_with_one_line_and_the_run_goes_on(
    options: Options, every: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**options, "steps": 2}
    expected = outcome(whole(options, tmp_path))
    for operation in itertools.count(0, every):
        out = tmp_path / str(operation)
        if not full_at(options, out, operation, lambda: capsys.readouterr().err):
            break
        assert outcome(out) == expected, operation
    assert operation > 40, operation  # else they were not counted


def signal_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process get a signal in every step of this number."""
    taken = train.Stepper.step

    def signalled(stepper: train.Stepper, factor: float) -> Any:
        if stepper._optimizer.step_count == step:
            os.kill(os.getpid(), number)
        return taken(stepper, factor)

    monkeypatch.setattr(train.Stepper, "step", signalled)


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_a_signal_ends_with_one_line_and_the_run_goes_on(
    options: Options, left_alone: Path, sweep: bool, number: int, word: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, command = tmp_path / "run", ["sweep"] if sweep else []
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        signal_at(3, number, patched)
        assert cli.main([*command, *arguments(options, out)]) == 128 + number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    run = out / "lr-8e-05-eps-0.001" if sweep else out
    before = ", and the runs before it" if sweep else ""
    resume = " ".join(["zo-finetune", *command, "--resume"])
    safe = f"everything up to step 3, in {run / 'trajectory.zo'}{before}"
    line = f"zo-finetune: {word}; safe: {safe}; continue with: {resume} {out}"
    assert capsys.readouterr().err == line + "\n"
    assert cli.main([*command, "--resume", str(out)]) == 0
    assert outcome(run)["weights"] == outcome(left_alone)["weights"]


def test_before_and_after_the_steps(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("zo_kernels.finetune.runs.job.prepare_learner", interrupted)
        assert cli.main(arguments(options, out)) == 130
    assert capsys.readouterr().err == "zo-finetune: interrupted; nothing was written\n" and not out.exists()

    def broken(*given: Any) -> None:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="a fault of ours"):
        patched.setattr(train.Stepper, "step", broken)
        cli.main(arguments(options, out))
    assert capsys.readouterr().err == (
        f"zo-finetune: stopped by RuntimeError (traceback below); safe: the settings, in {out}; "
        f"continue with: zo-finetune --resume {out}\n"
    )


@pytest.fixture(scope="module")
def unfinished(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted before its sixth step."""
    out = tmp_path_factory.mktemp("unfinished") / "run"
    with pytest.MonkeyPatch.context() as patched:
        signal_at(5, signal.SIGINT, patched)
        assert cli.main(arguments(options, out)) == 130
    return out


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _cut_lines(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b'{"event": "st\n', *lines[5:]]))


# What is done to a run of five steps of 24 bytes; what is said; and the steps that a replay can still have.
DAMAGE: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "a bit": (lambda run: _flip(run / "trajectory.zo", -60), r"trajectory.zo: record 3, at byte \d+: .*--recover", 2),
    "cut at a record's end": (
        lambda run: os.truncate(run / "trajectory.zo", (run / "trajectory.zo").stat().st_size - 48),
        r"trajectory.zo: expected the 5 steps that metrics.jsonl speaks of, got 3: .*--recover", 3,
    ),
    "no trajectory": (
        lambda run: (run / "trajectory.zo").unlink(), r"trajectory.zo: expected the 5 steps .* got 0: .*--recover", -1
    ),
    "a line of the metrics": (
        lambda run: _cut_lines(run / "metrics.jsonl"), r"metrics.jsonl: line 5: expected a JSON object.*--recover", 5
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_and_recovered_from(
    options: Options, left_alone: Path, unfinished: Path, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message, sound = DAMAGE[what]
    run = Path(shutil.copytree(unfinished, tmp_path / "run"))
    damage(run)
    before = tree(run)
    with pytest.raises(SystemExit) as exit:
        cli.main(["--resume", str(run)])
    said = capsys.readouterr().err.splitlines()

    assert exit.value.code == 2 and re.search(message, said[-1]), said
    assert tree(run) == before
    for step in (sound, sound + 1):
        replay = ["replay", str(run), "--step", str(step), "--out", str(tmp_path / f"at-{step}")]
        if step == sound and sound >= 0:
            assert cli.main(replay) == 0
        else:
            with pytest.raises(SystemExit):
                cli.main(replay)
    capsys.readouterr()
    assert cli.main(["--resume", str(run), "--recover"]) == 0
    assert "warning: " in capsys.readouterr().out
    assert outcome(run)["weights"] == outcome(left_alone)["weights"]
    assert outcome(run)["steps"] == outcome(left_alone)["steps"]
    kept = tree(run)
    if "bit" in what:
        assert before["trajectory.zo"].endswith(kept["trajectory.zo.damaged-1"])
    assert kept["metrics.jsonl.damaged-1"] == before["metrics.jsonl"]


def test_recover_needs_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments_ in (["--recover"], ["sweep", "--recover"]):
        with pytest.raises(SystemExit):
            cli.main(arguments_)
        assert "--recover: expected together with --resume" in capsys.readouterr().err


def test_metrics_that_are_behind_are_filled_in(
    options: Options, left_alone: Path, unfinished: Path, tmp_path: Path
) -> None:
    """A step is in the trajectory before it is in the metrics; a power cut may take more of these."""
    run = Path(shutil.copytree(unfinished, tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line).get("step", 0) < 2))
    assert cli.main(["--resume", str(run)]) == 0
    assert outcome(run)["weights"] == outcome(left_alone)["weights"]
    assert outcome(run)["losses"] == outcome(left_alone)["losses"]
