"""What would be dropped or changed silently on the way from the options and the data to the steps: refused, or said."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

for module in ("transformers", "datasets", "rich", "matplotlib", "safetensors"):
    pytest.importorskip(module)

from rich.console import Console  # noqa: E402
from tiny_run import cut_off, rewrite, tiny_encoder, tiny_options, write_table  # noqa: E402

import zo_kernels as zo  # noqa: E402
from zo_kernels.finetune import Config, cli, finetune  # noqa: E402
from zo_kernels.finetune.folders.metrics import Evaluation, Metrics, records_of  # noqa: E402
from zo_kernels.finetune.prompts.task_data import TaskData, load_task  # noqa: E402
from zo_kernels.finetune.runs import report, train  # noqa: E402
from zo_kernels.finetune.tasks import TASKS  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache", "without_curves")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_options(tiny_encoder(folder / "tiny"), write_table(folder / "words.tsv")) | {"steps": 2}


WITHOUT_EFFECT: dict[str, tuple[dict[str, Any], str]] = {
    "shots": ({"shots": 3, "head_start": "names"}, "--shots belongs to --head-start few-shot, got 3 with .* names"),
    "new tokens": ({"max_new_tokens": 9}, "--max-new-tokens belongs to --task, got 9 without a task"),
    "new tokens of a choice": (
        {"task": "sst2", "model": "m", "max_new_tokens": 9}, "--max-new-tokens belongs to .* generated, .* --task sst2"
    ),
    "rounding": ({"rounding": "nearest"}, "--rounding belongs to 16-bit weights, got nearest with --dtype fp32"),
    "distribution": ({"distribution": "signs"}, "--distribution: expected one of normal, rademacher, got 'signs'"),
    "drop": ({"method": "lezo", "freeze": "encoder"}, "--drop leaves some blocks of the encoder unchanged, got 0.5"),
    "anchor": ({"anchor_every": 3}, "--anchor-every belongs to --method mezo-svrg, got --method mezo"),
    "another estimator": (
        {"method": "fzoo", "estimator": "two_sided"}, "--estimator: --method fzoo has its own, one_sided; got two_sided"
    ),
    "normalize": ({"method": "mezo-svrg", "normalize": "rms"}, "--normalize: --method mezo-svrg has its own; got rms"),
    "no rate": ({"normalize": "rms"}, "--normalize rms: expected together with --lr, .* --lr auto"),
    "deviation": ({"normalize": "std", "lr": 1e-3}, "--normalize std .* --directions .* at least 2 of them, got 1"),
    "mask": ({"mask": "kept"}, "--mask belongs to --sparsity above 0, got kept with 0.0"),
    "anchor of a world": (
        {"method": "mezo-svrg", "anchor_examples": 2**30}, "--anchor-examples: expected a whole number of at most 1677"
    ),
    "anneal": ({"anneal": 5.0}, "--anneal belongs to --method mezo-svrg, got --method mezo"),
    "anneal by 1": ({"method": "mezo-svrg", "anneal": 1.0}, "--anneal: expected a finite number above 1, got 1.0"),
    "anneal above": ({"method": "mezo-svrg", "anneal_above": 2.0}, "--anneal-above belongs to --anneal, got 2.0 alone"),
    "rate": ({"lr": "fast"}, "--lr: expected a finite number above 0, or auto, got 'fast'"),
    "test examples": ({"test_examples": "some"}, "--test-examples: expected a whole number of at least 1, or all, got"),
    "no test examples": ({"test_examples": 0}, "--test-examples: expected a whole number of at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("option", WITHOUT_EFFECT)
def test_options_without_effect_are_refused(option: str) -> None:
    settings, message = WITHOUT_EFFECT[option]
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_what_does_not_fit_the_model_or_the_data_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    for change, message in (
        ({"max_tokens": 17}, "--max-tokens: expected at most 16, as many as the model can read, got 17"),
        (
            {"test_examples": 1000},
            "--test-examples: expected all, or at most 16, .*, got 1000",
        ),
        ({"method": "mezo-svrg", "anchor_examples": 57}, "--anchor-examples: expected at most 56, .* got 57"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(Config(**tiny | change, out=str(tmp_path / "run")))
        assert not (tmp_path / "run").exists()


def test_a_run_says_what_must_be_known_of_its_data(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "words.tsv"
    lines = Path(tiny["data"]).read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join([*lines, lines[1], "fruit\t[b]pomme", "metal\tcuivre"]) + "\n", encoding="utf-8")
    options = {**tiny, "data": str(data), "test_examples": 9, "out": str(tmp_path / "run")}
    assert cli.main([f"--{name.replace('_', '-')}={value}" for name, value in options.items()]) == 0
    said = capsys.readouterr().out
    notes = records_of(tmp_path / "run")[0]["notes"]
    assert f"1 row repeats another and is left out (the first: line {len(lines) + 1}, like line 2)" in notes[0]
    assert "9 of the 16 held-out texts are used as the test (--test-examples changes this)" in notes
    assert "the tokenizer knows no word of 2 texts (the first: '[b]pomme')" in notes
    assert len(notes) == 3 and all(note in said for note in notes)


@pytest.mark.parametrize("option", ["--test-examples=all", "--test-examples=16"])
def test_all_of_the_test(tiny: dict[str, Any], option: str, tmp_path: Path) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in {**tiny, "out": tmp_path / "run"}.items()]
    assert cli.main([*arguments, option]) == 0
    assert records_of(tmp_path / "run")[-1]["test_texts"] == 16
    assert records_of(tmp_path / "run")[0]["notes"] == []


def test_settings_that_were_changed_are_named(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cut_off({**tiny, "out": str(tmp_path / "run")}, monkeypatch, 1)
    before = (run / "config.json").read_bytes()
    rewrite(run / "config.json", lr=1.0, steps=9)
    with pytest.raises(
        ValueError, match=r"config.json: .* started with, got lr 8e-05 \(now 1.0\), steps 2 \(now 9\): restore them"
    ):
        train.resume(run, Console(quiet=True))
    (run / "config.json").write_bytes(before)
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(metrics[0])
    for name in ("distribution", "estimator", "normalize", "mask", "anneal", "anneal_above"):
        del first["settings"][name]  # as a version that knew normals and MeZO's estimates alone wrote it
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(first), *metrics[1:], ""]), encoding="utf-8")
    rewrite(run / "config.json", distribution="rademacher")
    with pytest.raises(ValueError, match=r"got distribution 'normal' \(now 'rademacher'\): restore them"):
        train.resume(run, Console(quiet=True))
    rewrite(run / "config.json", distribution=None, estimator="one_sided")
    with pytest.raises(ValueError, match=r"got estimator 'two_sided' \(now 'one_sided'\): restore them"):
        train.resume(run, Console(quiet=True))
    rewrite(run / "config.json", estimator=None, normalize=None, mask=None)
    older = Path(shutil.copytree(run, tmp_path / "older"))
    assert train.resume(run, Console(quiet=True)).steps == 2
    del first["settings"], first["notes"]  # and as one before that did
    (older / "metrics.jsonl").write_text("\n".join([json.dumps(first), *metrics[1:], ""]), encoding="utf-8")
    assert train.resume(older, Console(quiet=True)).steps == 2


@pytest.mark.parametrize("method", ["fzoo", "mezo-svrg"])
def test_a_rate_that_is_found(
    tiny: dict[str, Any],
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once, at the start: a run that was cut off at any moment goes on with it, and one with that rate is the same."""
    options = {**tiny, "method": method, "directions": 2, "steps": 3}
    options |= {"anchor_examples": 8} if method == "mezo-svrg" else {}
    monkeypatch.setattr(report, "draw_rates", lambda record, path: path.write_bytes(b""))
    given = {**options, "lr": "auto", "out": str(tmp_path / "whole")}
    assert cli.main([f"--{name.replace('_', '-')}={value}" for name, value in given.items()]) == 0
    (record,) = (r for r in records_of(tmp_path / "whole") if r["event"] == "lr")
    forwards, of_run = record["forwards"], {"fzoo": 3 * 3, "mezo-svrg": 3 * 4 * 1.8}[method]
    assert f"lr {record['lr']:.3g} (--lr auto: {forwards} forwards, {forwards / of_run:.0%} of the run's)" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "whole" / "lr.png").exists()

    def steps(run: str) -> Any:
        return [(r.losses, r.rates) for r in zo.Trajectory.load(tmp_path / run / "trajectory.zo")]

    finetune(Config(**options, lr=record["lr"], out=str(tmp_path / "given")), Console(quiet=True))
    assert steps("given") == steps("whole")
    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(Metrics, "write", dying_at("lr", Metrics.write))
        finetune(Config(**given | {"out": str(tmp_path / "cut")}), Console(quiet=True))
    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(Metrics, "write", dying_at("step", Metrics.write))
        train.resume(tmp_path / "cut", Console(quiet=True))
    monkeypatch.setattr(zo, "find_lr", None)
    train.resume(tmp_path / "cut", Console(quiet=True))
    assert steps("cut") == steps("whole")


def dying_at(at: str, write: Callable[..., None]) -> Callable[..., None]:
    """Instead of writing such a record."""

    def dying(metrics: Metrics, event: str, **values: Any) -> None:
        if event == at:
            raise InterruptedError
        write(metrics, event, **values)

    return dying


def test_an_evaluation_shows_a_bar() -> None:
    def evaluate(examples: range, done: Callable[[int], object]) -> Evaluation:
        done(len(examples))
        return Evaluation(1.0, 0.5)

    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    job: Any = SimpleNamespace(learner=SimpleNamespace(evaluate=evaluate, splits={"test": range(40)}))
    metrics: Any = SimpleNamespace(find=lambda *_, **__: None, write=lambda *_, **__: None)
    assert train._evaluated(job, metrics, console, "test", 0).accuracy == 0.5
    assert "evaluating test" in written.getvalue() and "0/40" in written.getvalue()


# Tasks


def load(folder: Path, **counts: Any) -> TaskData:
    return load_task("sst2", TASKS["sst2"], str(folder), **{"seed": 0, "train": None, "dev": 2, "test": None} | counts)


def rows(folder: Path, train: list[str], validation: list[str], suffix: str = "jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in (("train", train), ("validation", validation)):
        (folder / f"{name}.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def row(sentence: Any, label: Any) -> str:
    return json.dumps({"sentence": sentence, "label": label})


GOOD = [row(f"film {at}", at % 2) for at in range(8)]


def test_what_must_be_known_of_a_task(tmp_path: Path) -> None:
    folder = rows(tmp_path / "rows", [*GOOD, "", row(" ", 0)], [GOOD[0], GOOD[1], row("new", 1)])
    data = load(folder, test="all")
    shared = sum(f"film {at}" in {example.fields["sentence"] for example in data.train} for at in (0, 1))
    said = "\n".join(data.notes)
    assert f"{folder / 'train.jsonl'}: 1 blank line was skipped (the first: line 9)" in said
    assert f"1 example has an empty text (the first: {folder / 'train.jsonl'}, line 10, sentence)" in said
    assert shared and f"{shared} of the 3 test examples are also among the training examples" in said
    data = load(rows(folder, [row(f"{at}", 1) for at in range(8)], GOOD))
    assert data.notes == (
        "all 6 training examples have the same label, great: their score says little",
        "all 2 development examples have the same label, great: their score says little",
    )
    assert load(rows(folder, [row(f"a {at}", at % 2) for at in range(40)], GOOD), dev=20).notes == ()


BAD_ROWS = {
    "half a label": ([row("a", 0.5)], "jsonl", r"--task sst2, .*train.jsonl, line \d: .* a whole number, got 0.5"),
    "no label": ([row("a", None)], "jsonl", r"train.jsonl, line \d: expected a row with sentence, label"),
    "a comma": (["sentence,label", "a, b,1"], "csv", r"train.csv, line 2: expected 2 fields.*double quotes"),
    "an index": (["sentence,label", "0,a,1"], "csv", r"train.csv, line 2: expected 2 fields"),
    "another name": (["text,label", "a,1"], "csv", r"train.csv, line 1: expected a header with .*sentence and label"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_bad_rows_of_a_task(bad: str, tmp_path: Path) -> None:
    lines, suffix, message = BAD_ROWS[bad]
    with pytest.raises(ValueError, match=message):
        load(rows(tmp_path / "rows", lines * 4 if suffix == "jsonl" else lines, lines, suffix))


def test_words_that_pandas_takes_for_nothing_are_texts(tmp_path: Path) -> None:
    words = ["NA", "null", "None", "nan", "2020-01-01", "7"]
    lines = ["sentence,label", *(f"{word},{at % 2}" for at, word in enumerate(words))]
    data = load(rows(tmp_path / "rows", lines, lines, "csv"))
    assert {example.fields["sentence"] for example in data.test} == set(words)
