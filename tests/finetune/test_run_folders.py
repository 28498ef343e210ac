"""Folders of runs: which are overwritten, by whom, and what is said when a model was lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for module in ("transformers", "rich", "matplotlib", "safetensors"):
    pytest.importorskip(module)

from rich.console import Console  # noqa: E402
from tiny_run import rewrite, tree, whole_run  # noqa: E402

import zo_kernels as zo  # noqa: E402
from zo_kernels import files  # noqa: E402
from zo_kernels.finetune import Config, cli, load_classifier  # noqa: E402
from zo_kernels.finetune.folders import claims, run_folder  # noqa: E402
from zo_kernels.finetune.runs import job, train  # noqa: E402
from zo_kernels.finetune.sweeps import sweep  # noqa: E402
from zo_kernels.finetune.sweeps.plan import SWEEP  # noqa: E402

Options = dict[str, Any]


def settings(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_bytes())


def unmark(run: Path) -> None:
    """As versions from before there was a mark left it."""
    rewrite(run / "config.json", zo_kernels=None, format=None)


OURS: dict[str, Callable[[Path], object]] = {
    "a run": lambda run: None,
    "of a version before": unmark,
    "with a file of somebody": lambda run: (run / "notes.txt").write_text("mine"),
    "killed while it was overwritten": lambda run: run_folder.write_config(run, None),
    "cut off": lambda run: shutil.rmtree(run / "model"),
    "with a link to elsewhere in its model": lambda run: (run / "model" / "x").symlink_to(run.parent / "elsewhere"),
}
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda run: (run / "config.json").unlink(), "it has no config.json"),
    "those of a model": (lambda run: (run / "config.json").write_text('{"model_type": "bert"}'), "other files"),
    "of a later version": (lambda run: rewrite(run / "config.json", format=2), "format: expected 1, got 2"),
    "a mark that is none": (lambda run: rewrite(run / "config.json", format=[1]), r"expected a version and a number"),
    "no JSON": (lambda run: (run / "config.json").write_bytes(b"\xff{"), "expected a JSON object in UTF-8"),
    "a folder in place of a file": (lambda run: (run / "curves.png").mkdir(), "curves.png to be a file, got a folder"),
    "a file in place of a folder": (
        lambda run: (shutil.rmtree(run / "model"), (run / "model").touch()), "model to be a folder, got a file"
    ),
    **{
        f"{name} is a link": (
            lambda run, name=name: (
                run_folder.discard(run / name), (run / name).symlink_to(run.parent / "elsewhere" / Path(name).name)
            ),
            "expected a real file or folder, got .*, a link to .*elsewhere",
        )
        for name in ("config.json", "trajectory.zo", "metrics.jsonl", "curves.png", "start", "model", "run.lock",
                     "start/labels.json")
    },
}  # fmt: skip


def elsewhere(run: Path) -> Path:
    """A folder that has all that a run has, and belongs to somebody."""
    return Path(shutil.copytree(run, run.parent / "elsewhere"))


@pytest.mark.parametrize("what", OURS)
def test_a_run_of_ours_is_overwritten_and_nothing_else(run: Path, two_steps: Options, what: str) -> None:
    other = elsewhere(run)
    OURS[what](run)
    before = tree(other)
    with claims.claim(Config(**two_steps, out=str(run), overwrite=True, seed=7)):
        left = set(os.listdir(run)) - {"run.lock"}
    assert left == ({"config.json", "notes.txt"} if "somebody" in what else {"config.json"})
    assert run_folder.config_of(run).seed == 7 and not (run / "run.lock").exists()
    assert tree(other) == before


@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_that_is_not_ours_is_not_overwritten(run: Path, two_steps: Options, what: str) -> None:
    change, message = FOREIGN[what]
    other = elsewhere(run)
    (run / "curves.png").unlink(missing_ok=True)
    change(run)
    before = tree(run), tree(other)
    with pytest.raises(ValueError, match=message):
        claims.claim(Config(**two_steps, out=str(run), overwrite=True))
    assert (tree(run), tree(other)) == before


def test_overwriting_that_is_cut_off_leaves_no_mixture(finished: Path, two_steps: Options, tmp_path: Path) -> None:
    """Of the settings of one run and files of another, which could be resumed."""
    config = Config(**two_steps, overwrite=True, seed=7)
    states = []
    for operation in range(20):
        run = Path(shutil.copytree(finished, tmp_path / str(operation)))
        config.out, left = str(run), operation

        def killed(do: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*given: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return do(*given, **more)

            return counted

        with pytest.MonkeyPatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            for name in ("replace", "unlink", "rmdir"):
                patched.setattr(os, name, killed(getattr(os, name)))
            with claims.claim(config):
                pass
        (run / "run.lock").unlink(missing_ok=True)
        state = "replaced"
        if run_folder.started(run):
            state = "old" if run_folder.config_of(run).seed == 0 else "new"
            there = {name: value for name, value in tree(run).items() if not name.endswith(".part")}
            assert there == (tree(finished) if state == "old" else {"config.json": there["config.json"]})
        states.append(state)
        with claims.claim(config):
            assert run_folder.config_of(run).seed == 7
    assert list(dict.fromkeys(states)) == ["old", "replaced", "new"]


def test_a_run_and_a_sweep_do_not_overwrite_each_other(run: Path, two_steps: Options, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    run_folder.write_json(sweep / "sweep.json", run_folder.marked({}))
    assert claims.check_new(str(sweep), SWEEP, {}, overwrite=True) == sweep
    for folder, kind in ((sweep, claims.RUN), (run, SWEEP)):
        with pytest.raises(ValueError, match=f"--overwrite: expected the folder of {kind.name}"):
            claims.check_new(str(folder), kind, {}, overwrite=True)


def test_overwritten_by_command(run: Path, two_steps: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` does it, over a run of the version before, too; through a link to the folder, which is its name."""
    unmark(run)
    (run.parent / "named").symlink_to(run)
    expected = tree(run)
    whole_run({**two_steps, "out": str(run.parent / "named"), "overwrite": True}, resume=False)
    assert settings(run)["format"] == 1 and settings(run)["zo_kernels"] == zo.__version__
    after = tree(run)
    for same in ("model/model.safetensors", "model/head.safetensors", "trajectory.zo"):
        assert after[same] == expected[same]
    assert after.keys() == expected.keys()


@pytest.mark.parametrize("option", ["model", "data", "test_data"])
@pytest.mark.parametrize("where", ["equal", "inside", "around", "through a link"])
def test_out_is_apart_from_what_is_read(two_steps: Options, option: str, where: str, tmp_path: Path) -> None:
    source = tmp_path / "things" / "source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    out = {"equal": source, "inside": source / "a" / "b", "around": source.parent, "through a link": tmp_path / "link"}
    given = {**two_steps, option: str(source), "out": str(out[where]), "overwrite": True}
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=f"--out: expected a folder apart from the data and the model.*--{option[:4]}"):
        claims.claim(Config(**given))
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded(
    two_steps: Options, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "model")
    for module in (job, sweep):  # which has it by name
        monkeypatch.setattr(module, "prepare_learner", lambda *more: 1 / 0)
    monkeypatch.setattr(os, "access", lambda *more: False)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in two_steps.items()]
    new = str(tmp_path / "a" / "b")
    for arguments in ([*given, "--out", new], ["sweep", *given, "--out", new], ["--resume", str(run)]):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        said = capsys.readouterr().err
        assert exit.value.code == 2 and "expected a folder that can be written, got" in said and "no permission" in said
    assert not (tmp_path / "a").exists()


def test_the_second_process_is_refused(run: Path, two_steps: Options, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it wants to do with the folder; and a lock that a killed process left keeps nobody out."""
    shutil.rmtree(run / "model")
    pytest.importorskip("fcntl")
    program = (
        "import fcntl, os, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print(os.getpid(), file=file, flush=True)\nprint(flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(run / "run.lock")]
    before = tree(run)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        overwriting = [f"--{name.replace('_', '-')}={value}" for name, value in two_steps.items()]
        for arguments in (["--resume", str(run)], [*overwriting, "--out", str(run), "--overwrite"]):
            with pytest.raises(SystemExit) as exit:
                cli.main(arguments)
            assert exit.value.code == 2
            assert f"expected a run that no other process writes, but it is held: process {other.pid}" in (
                capsys.readouterr().err
            )
        other.kill()
    assert {name: value for name, value in tree(run).items() if name != "run.lock"} == before
    (run / "run.lock").write_text("1\n")
    whole_run({**two_steps, "out": str(run)}, resume=True)
    assert run_folder.finished(run) and not (run / "run.lock").exists()


LOST: dict[str, Callable[[Path], object]] = {
    "deleted": lambda run: shutil.rmtree(run / "model"),
    "without labels": lambda run: (run / "model" / "labels.json").unlink(),
    "labels damaged": lambda run: (run / "model" / "labels.json").write_text("{"),
    "head gone": lambda run: (run / "model" / "head.safetensors").unlink(),
    "one bit": lambda run: _flip(run / "model" / "model.safetensors"),
    "cut off": lambda run: os.truncate(run / "model" / "model.safetensors", 1000),
    "the model's own settings": lambda run: (run / "model" / "config.json").write_text("{"),
    "no tokenizer": lambda run: (run / "model" / "tokenizer.json").write_text("{"),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", LOST)
def test_a_model_that_was_lost_is_made_again(run: Path, finished: Path, what: str, tmp_path: Path) -> None:
    (run / "curves.png").touch()
    LOST[what](run)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"zo-finetune replay {run} --out DIR"):
        load_classifier(run)
    if what == "deleted":
        assert cli.main(["replay", str(run), "--out", str(tmp_path / "again")]) == 0
        for name in ("model.safetensors", "head.safetensors"):
            assert (tmp_path / "again" / "model" / name).read_bytes() == (finished / "model" / name).read_bytes()


def test_a_version_from_before_checksums_can_be_loaded(run: Path) -> None:
    for folder in ("start", "model"):
        rewrite(run / folder / "labels.json", weights=None)
    assert load_classifier(run).names == ("fruit", "metal")


def test_the_lock_is_held_for_the_whole_run(
    two_steps: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, evaluate = tmp_path / "run", train._evaluate

    def watched(*arguments: Any) -> Any:
        with pytest.raises(BlockingIOError, match="this one"):
            files.Locked(out / "run.lock", "held")
        return evaluate(*arguments)

    monkeypatch.setattr(train, "_evaluate", watched)
    train.finetune(Config(**two_steps, out=str(out)), Console(quiet=True))
    assert not (out / "run.lock").exists()


def test_a_used_run_folder_is_kept(two_steps: Options, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {**two_steps, "out": str(out)}
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="--out: expected an empty or new folder"):
        train.finetune(Config(**options))
    with pytest.raises(ValueError, match=r"--overwrite: expected the folder of a run .* got .*other files"):
        train.finetune(Config(**options, overwrite=True))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="--out: expected a folder, got the file"):
        train.finetune(Config(**options | {"out": str(out / "notes.txt")}))


def test_a_run_killed_before_its_first_file_was_whole_can_be_started_again(two_steps: Options, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {**two_steps, "out": str(out)}
    (out / "model.part").mkdir(parents=True)
    (out / "model.part" / "model.safetensors").touch()
    for name in ("config.json.part", "config.json.12-0.part", "run.lock"):
        (out / name).touch()
    train.finetune(Config(**options))
    assert load_classifier(out).names
    assert not [path for path in out.rglob("*") if path.suffix in (".part", ".lock")]
