"""zo-finetune sweep: its runs are those that each would be alone, whatever interrupts them; which is stopped, and the
best."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

for module in ("transformers", "datasets", "rich", "matplotlib", "safetensors"):
    pytest.importorskip(module)

from rich.console import Console  # noqa: E402
from tiny_run import tiny_encoder, tiny_options, write_table  # noqa: E402
from tiny_tasks import prompted_options, tiny_roberta, write_rows  # noqa: E402

import zo_kernels as zo  # noqa: E402
from zo_kernels.finetune import Config, cli, finetune  # noqa: E402
from zo_kernels.finetune.folders import run_folder  # noqa: E402
from zo_kernels.finetune.folders.metrics import records_of  # noqa: E402
from zo_kernels.finetune.runs import report, train  # noqa: E402
from zo_kernels.finetune.runs.stopping import StopRule  # noqa: E402

Options = dict[str, Any]
RATES, SCALES = (1e-4, 1e-3), (1e-3, 1e-2)

pytestmark = pytest.mark.usefixtures("own_cache", "without_curves")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Of a classifier, whose head is made before training."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny = tiny_options(tiny_encoder(folder / "tiny"), write_table(folder / "words.tsv"))
    return {**tiny, "distribution": "rademacher"}


def arguments(options: Options, out: Path, rates: tuple[float, ...] = RATES) -> list[str]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    lists = [f"--lr={','.join(map(str, rates))}", f"--eps={','.join(map(str, SCALES))}"]
    return ["sweep", *given, *lists, f"--out={out}"]


def table_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "sweep.csv").open(encoding="utf-8")))


def run_of(out: Path) -> dict[str, Any]:
    """What must not depend on when and beside which other runs a run was done."""
    records = records_of(out)
    dev = [{**r, "seconds": 0} for r in records if r["event"] == "evaluation" and r["split"] == "dev"]
    return {"dev": dev, "steps": [(r.losses, r.rates) for r in zo.Trajectory.load(out / "trajectory.zo")]}


def outcome(out: Path) -> dict[str, Any]:
    runs = {row["folder"]: run_of(out / row["folder"]) for row in table_of(out)}
    weights = {str(path.relative_to(out)): path.read_bytes() for path in out.glob("*/model/*.safetensors")}
    tests = [r["loss"] for path in sorted(out.iterdir()) for r in records_of(path) if r.get("split") == "test"]
    return {"table": table_of(out), "runs": runs, "weights": weights, "tests": tests}


@pytest.fixture(scope="module")
def swept(options: Options, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep that was left alone, and what it printed."""
    out = tmp_path_factory.mktemp("swept") / "sweep"
    with pytest.MonkeyPatch.context() as patch, (out.parent / "said").open("w+") as said:
        patch.setattr(report, "draw_curves", lambda records, path: None)
        patch.setattr("sys.stdout", said)
        assert cli.main(arguments(options, out)) == 0
        said.seek(0)
        return out, said.read()


def test_every_run_is_what_it_would_be_alone(swept: tuple[Path, str], options: Options, tmp_path: Path) -> None:
    out, _ = swept
    for rate in RATES:
        for eps in SCALES:
            alone = tmp_path / f"{rate}-{eps}"
            finetune(Config(**options, lr=rate, eps=eps, out=str(alone)), Console(quiet=True))
            assert run_of(out / f"lr-{rate}-eps-{eps}") == run_of(alone)


def test_the_best_on_the_development_examples_is_tested_and_saved(swept: tuple[Path, str], options: Options) -> None:
    out, said = swept
    rows = table_of(out)
    ranks = [(-float(row["dev_accuracy"]), float(row["dev_loss"])) for row in rows]
    assert ranks == sorted(ranks) and len(set(ranks)) > 1 and len(rows) == 4
    assert json.loads((out / "sweep.json").read_text(encoding="utf-8"))["runs"][0]["folder"] == rows[0]["folder"]
    for place, row in enumerate(rows):
        tested = [r["step"] for r in records_of(out / row["folder"]) if r.get("split") == "test"]
        assert tested == ([0, 6] if place == 0 else []) and run_folder.finished(out / row["folder"]) == (place == 0)
        assert (row["steps"], row["stopped"]) == ("6", "")
    assert f"testing the best run: {rows[0]['folder']}" in said and "sweep, best run first" in said
    command = shlex.split(said.splitlines()[-1])
    parsed = vars(cli.parser().parse_args(command[1:]))
    parsed.pop("resume"), parsed.pop("recover")
    best = run_folder.config_of(out / rows[0]["folder"])
    assert {**vars(Config(**parsed)), "out": best.out} == vars(best)


@pytest.mark.parametrize("after", [3, 9, 24])
def test_a_sweep_that_was_cut_off_ends_with_the_same_bits(
    swept: tuple[Path, str], options: Options, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first and second run, and before the best is tested."""
    out, taken, step, whole = tmp_path / "sweep", 0, train.Stepper.step, train.run

    def dying(stepper: train.Stepper, factor: float) -> Any:
        nonlocal taken
        if taken == after:
            raise InterruptedError
        taken += 1
        return step(stepper, factor)

    def dead(*arguments: Any, **options: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched, pytest.raises((SystemExit, InterruptedError)):
        patched.setattr(train.Stepper, "step", dying)
        patched.setattr(train, "run", dead if after == 24 else whole)
        cli.main(arguments(options, out))
    moved = out.rename(tmp_path / "moved")
    assert cli.main(["sweep", "--resume", str(moved)]) == 0
    assert outcome(moved) == outcome(swept[0])
    assert cli.main(["sweep", "--resume", str(moved)]) == 0
    assert outcome(moved) == outcome(swept[0])


def test_prompts_are_swept_and_runs_that_diverge_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rte", "rte")
    options = prompted_options(tiny_roberta(tmp_path / "model"), "rte", data) | {"steps": 45, "eval_every": 5}
    options.pop("lr")
    out = tmp_path / "sweep"
    assert cli.main([*arguments(options, out, (1e-4, 3.0)), "--stop-margin=0.25"]) == 0
    rows = table_of(out)
    assert [(row["lr"], row["stopped"] == "") for row in rows] == [("0.0001", True)] * 2 + [("3.0", False)] * 2
    assert all(int(row["steps"]) < 45 for row in rows[2:])
    said = capsys.readouterr().out
    assert re.search(r"3\.0 .*(dev loss|steps refused|not finite)", said)
    assert cli.main([*arguments(options, tmp_path / "hopeless", (3.0,)), "--stop-margin=0.25"]) == 1
    assert "every run was stopped early: lower --lr or --eps" in capsys.readouterr().err
    assert not list((tmp_path / "hopeless").glob("*/model"))
    # The same folder again: what is there of the old runs is not taken for the new ones'.
    assert cli.main([*arguments(options, tmp_path / "hopeless", (1e-4,)), "--overwrite", "--steps=2"]) == 0
    assert [row["steps"] for row in table_of(tmp_path / "hopeless")] == ["2", "2"]


def test_overwriting_begins_anew(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it is cut off: neither runs nor heads of the old sweep are taken for those of the new one."""
    out, alone = tmp_path / "sweep", tmp_path / "alone"
    assert cli.main(arguments(options, out, (1e-3,))) == 0

    def dying(*arguments: Any, **options: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(train.Stepper, "step", dying)
        cli.main([*arguments(options, out, (1e-3,)), "--overwrite", "--seed=1"])
    assert cli.main(["sweep", "--resume", str(out)]) == 0
    finetune(Config(**options, lr=1e-3, eps=1e-2, seed=1, out=str(alone)), Console(quiet=True))
    assert run_of(out / "lr-0.001-eps-0.01") == run_of(alone)


FLAT = [0.7] * 40
REASONS = [
    ("goes on", FLAT, 0.7, 0.7, None),
    ("at the margin", FLAT, 0.7, 1.2, None),
    ("dev loss", FLAT, 0.7, 1.21, "dev loss 1.21, from 0.7"),
    ("dev loss nan", [], 0.7, math.nan, "dev loss not finite"),
    ("dev loss infinite", [], 0.7, math.inf, "dev loss not finite"),
    ("training loss", [0.7] * 20 + [1.21] * 20, 0.7, 0.7, "training loss 1.21, from 0.7"),
    ("training loss, one step early", [0.7] * 20 + [9.0] * 19, 0.7, 0.7, None),
    ("high from the start", [9.0] * 40, 0.7, 0.7, None),
    ("refused", [0.7] * 5 + [None] * 20, 0.7, 0.7, "20 steps refused in a row"),
    ("refused one fewer", [0.7] * 21 + [None] * 19, 0.7, 0.7, None),
]


@pytest.mark.parametrize(
    ("losses", "before", "dev", "reason"), [row[1:] for row in REASONS], ids=[r[0] for r in REASONS]
)
def test_when_a_run_is_stopped(losses: list[float | None], before: float, dev: float, reason: str | None) -> None:
    assert StopRule(0.5).reason(losses, before, dev) == reason


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr=1e-3,nan"], "--lr: expected a finite number above 0, or auto, got nan"),
        (["--lr=1e-3,fast"], "argument --lr: expected different numbers, separated by commas, got '1e-3,fast'"),
        (["--lr=auto"], "argument --lr: expected numbers, got 'auto': a sweep tries rates that are given; --lr auto"),
        (["--eps=1e-3,0.001"], "argument --eps: expected different numbers, separated by commas, got '1e-3,0.001'"),
        (["--stop-margin=0"], "--stop-margin: expected a finite number above 0, got 0.0"),
        (["--batch-size=1000"], "--batch-size: expected at most"),
        (["--resume=x"], "--resume: expected no other option but --recover"),
    ],
)
def test_wrong_sweeps_leave_nothing(
    options: Options, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([*arguments(options, tmp_path / "sweep"), *more])
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_what_is_no_sweep_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (None, "{}", '{"plan": {"lr": 3}}'):
        if content is not None:
            (tmp_path / "sweep.json").write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit):
            cli.main(["sweep", "--resume", str(tmp_path)])
        assert "--resume: expected the folder of a sweep, with its sweep.json" in capsys.readouterr().err


def test_a_used_folder_is_kept(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(arguments(options, tmp_path))
    assert "--out: expected an empty or new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
