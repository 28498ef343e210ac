"""Whole runs of zo-finetune --task on tiny models: what they leave, resuming, replaying, and what they refuse."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

for module in ("transformers", "datasets", "rich", "matplotlib", "safetensors"):
    pytest.importorskip(module)

from rich.console import Console  # noqa: E402
from tiny_run import cut_off  # noqa: E402
from tiny_tasks import MODELS, prompted_options, row_of, write_rows  # noqa: E402

import zo_kernels as zo  # noqa: E402
from zo_kernels.finetune import Config, Summary, cli, finetune, load_classifier, load_prompted  # noqa: E402
from zo_kernels.finetune.folders.metrics import records_of  # noqa: E402
from zo_kernels.finetune.prompts.language_model import load_language_model  # noqa: E402
from zo_kernels.finetune.runs import train  # noqa: E402
from zo_kernels.finetune.runs.job import prepare  # noqa: E402

Options = dict[str, Any]

pytestmark = pytest.mark.usefixtures("own_cache", "without_curves")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def options_of(folder: Path, tmp_path: Path) -> Callable[[str, str], Options]:
    def make(model: str, task: str) -> Options:
        if not (folder / model).exists():
            MODELS[model](folder / model)
        data = write_rows(tmp_path / task, task)
        return {**prompted_options(folder / model, task, data), "out": str(tmp_path / "run")}

    return make


def arguments(options: Options) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def run(options: Options) -> Summary:
    return finetune(Config(**options), Console(quiet=True))


def test_a_run_from_the_command_line(
    options_of: Callable[[str, str], Options], capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of("opt", "sst2") | {"max_tokens": 8}
    assert cli.main(arguments(options)) == 0
    out = Path(options["out"])
    said, records = capsys.readouterr().out, records_of(out)
    start, summary = records[0], records[-1]
    assert (start["event"], start["task"], start["kind"], start["loss"]) == ("start", "sst2", "causal", "candidates")
    assert "sst2 (terrible, great): 24 texts to train on, 8 for development, 12 for the held-out test" in said
    assert start["cut"] and f"{start['cut']} texts are longer than 8 tokens (--max-tokens) and were cut" in said
    assert re.search(r"accuracy \d\.\d{3} -> \d\.\d{3} \([+-]\d+\.\d points\) in \d+ s$", said.strip())
    evaluations = [(r["split"], r["step"]) for r in records if r["event"] == "evaluation"]
    assert evaluations == [("test", 0), ("dev", 0), ("dev", 3), ("dev", 6), ("test", 6)]
    assert summary["event"] == "summary" and "f1" not in summary["after"]
    about = json.loads((out / "model" / "labels.json").read_text(encoding="utf-8"))
    assert about.pop("weights").keys() == {"model.safetensors"}
    assert about == {
        "names": ["terrible", "great"], "max_tokens": 8, "max_new_tokens": 50, "task": "sst2", "kind": "causal",
    }  # fmt: skip


def test_generated_answers_have_an_f1(
    options_of: Callable[[str, str], Options], capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of("gpt2", "squad") | {"objective": "f1", "steps": 2, "eval_every": 1}
    assert cli.main(arguments(options)) == 0
    said = capsys.readouterr().out
    assert "exact match" in said and re.search(r"step +1 +dev loss \d\.\d+ +dev F1 0\.\d+\n", said)
    assert said.splitlines()[-1].startswith("F1 0.")
    summary = records_of(Path(options["out"]))[-1]
    assert set(summary["after"]) == {"loss", "accuracy", "f1"}
    assert load_prompted(options["out"]).generates


@pytest.mark.parametrize(("model", "task"), [("opt", "copa"), ("roberta", "rte")])
def test_the_predictor_is_the_model_of_the_run(
    options_of: Callable[[str, str], Options], model: str, task: str
) -> None:
    options = options_of(model, task)
    job = prepare(Config(**options, dtype="bf16"))
    before = {name: value.clone() for name, value in job.classifier.state_dict().items()}
    summary = train.run(job, Console(quiet=True), 0.0)
    loaded = load_prompted(options["out"])
    trained = job.classifier.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in trained.items())
    rows = [json.loads(line) for line in (Path(options["task_data"]) / "validation.jsonl").read_text().splitlines()]
    right = 0
    for row, answer in zip(rows, loaded.predict(rows), strict=True):
        words = [word.format(**loaded.task.fields(row)).strip() for word in loaded.template.words]
        right += answer == words[row["label"]]
    assert right / len(rows) == pytest.approx(summary.after.accuracy) and loaded.predict([]) == []


def test_a_predictor_needs_its_columns(options_of: Callable[[str, str], Options]) -> None:
    options = options_of("opt", "squad") | {"steps": 1}
    run(options)
    row = row_of("squad", random.Random(3))
    loaded = load_prompted(options["out"])
    assert loaded.predict([{name: row[name] for name in ("title", "context", "question")}]) == loaded.predict([row])
    with pytest.raises(ValueError, match=r"row 1: expected a row with title, .*KeyError\('title'\)"):
        loaded.predict([row, {"question": "What?"}])
    with pytest.raises(TypeError, match=r"row 0: expected a mapping of the columns .*, got 'What"):
        loaded.predict(["What is it?"])
    with pytest.raises(ValueError, match="got one with prompts: use load_prompted"):
        load_classifier(options["out"])
    (Path(options["out"]) / "model" / "labels.json").write_text('{"names": ["a"], "max_tokens": 8}', encoding="utf-8")
    with pytest.raises(ValueError, match="got one that trained a classifier: use load_classifier"):
        load_prompted(options["out"])


def outcome(out: Path) -> dict[str, Any]:
    """All that must not depend on whether the run was interrupted."""
    records = records_of(out)
    return {
        "weights": [path.read_bytes() for path in sorted((out / "model").glob("*.safetensors"))],
        "evaluations": [{**r, "seconds": 0} for r in records if r["event"] == "evaluation"],
        "steps": [(r.losses, r.rates) for r in zo.Trajectory.load(out / "trajectory.zo")],
    }


@pytest.mark.parametrize(
    ("model", "task", "more"),
    [
        ("opt", "copa", {"method": "mezo-svrg", "anchor_every": 2, "anchor_examples": 8}),
        ("roberta", "wic", {"dtype": "bf16", "lr": "auto"}),
        ("gpt2", "squad", {"method": "lezo"}),
        ("opt", "boolq", {"objective": "accuracy", "eps": 0.1}),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    options_of: Callable[[str, str], Options],
    model: str,
    task: str,
    more: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options_of(model, task) | more
    run(options)
    whole = Path(options["out"]).rename(tmp_path / "whole")
    out = cut_off(options, monkeypatch, 4)
    train.resume(out, Console(quiet=True))
    assert outcome(out) == outcome(whole) and len(outcome(whole)["steps"]) == 6
    replayed = tmp_path / "replayed"
    assert cli.main(["replay", str(whole), "--out", str(replayed)]) == 0
    assert (replayed / "model" / "model.safetensors").read_bytes() == outcome(whole)["weights"][0]
    assert load_prompted(replayed).names == load_prompted(whole).names


@pytest.mark.parametrize(("model", "task"), [("opt", "sst2"), ("bert", "sst2")])
def test_learns(options_of: Callable[[str, str], Options], model: str, task: str) -> None:
    """A label that is a word of the text."""
    options = options_of(model, task) | {"steps": 150, "eval_every": 150, "batch_size": 8, "lr": 3e-3}
    folder = Path(options["task_data"])
    draw = random.Random(0)
    for split in ("train", "validation"):
        rows = [
            {"sentence": f"a {('red', 'green')[label]} hat", "label": label} for label in draw.choices((0, 1), k=40)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = run(options)
    assert summary.after.loss < summary.before.loss - 0.1


def test_frozen_embeddings_stay(options_of: Callable[[str, str], Options]) -> None:
    options = options_of("opt", "sst2") | {"freeze": "embeddings"}
    original = load_language_model(options["model"], "auto", "auto")[0].state_dict()
    run(options)
    trained = load_prompted(options["out"]).model.state_dict()
    kept = {name for name, value in trained.items() if torch.equal(value, original[name])}
    assert {name for name in trained if "embed_" in name or name == "lm_head.weight"} == kept


def test_other_data_are_no_resumption(
    options_of: Callable[[str, str], Options], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of("opt", "sst2")
    out = cut_off(options, monkeypatch, 2)
    write_rows(Path(options["task_data"]), "sst2", train=33)
    with pytest.raises(SystemExit):
        cli.main(["--resume", str(out)])
    assert re.search("--resume: expected the same data.*: .*texts", capsys.readouterr().err)


WRONG = {
    "no model": ({"model": None}, "--task: expected together with --model, a causal or masked language model, got no"),
    "no such task": ({"task": "sst3"}, "--task: expected one of sst2, rte, cb, boolq, wic, copa, squad, got 'sst3'"),
    "a table": ({"data": "t.tsv"}, "--data belongs to a classifier, got 't.tsv' with --task"),
    "a head": ({"shots": 3}, "--shots belongs to a classifier, got 3 with --task"),
    "no task": ({"task": None}, "--task-data belongs to --task, got .* without a task"),
    "kind without task": (
        {"task": None, "task_data": None, "dev_examples": None, "model_kind": "masked"},
        "--model-kind belongs to --task, got 'masked' without a task",
    ),
    "a frozen encoder": ({"freeze": "encoder"}, "--freeze: expected nothing or embeddings with --task"),
    "generating candidates": ({"task": "squad", "loss": "candidates"}, "--task squad is learned by generating"),
    "accuracy of a text": ({"task": "squad", "objective": "accuracy"}, "expected --loss tokens and --objective loss"),
    "F1 of a label": ({"objective": "f1"}, "--objective: expected loss or accuracy for --task sst2, got f1"),
    "another loss": ({"loss": "hinge"}, "--loss: expected one of candidates, tokens, got 'hinge'"),
    "no new tokens": ({"max_new_tokens": 0}, "--max-new-tokens: expected a whole number of at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_settings(options_of: Callable[[str, str], Options], wrong: str) -> None:
    change, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        Config(**options_of("opt", "sst2") | change)


def test_wrong_runs_leave_nothing(
    options_of: Callable[[str, str], Options], capsys: pytest.CaptureFixture[str]
) -> None:
    for model, task, change, message in (
        ("roberta", "sst2", {"loss": "tokens"}, "--loss: expected candidates for a masked model"),
        ("roberta", "copa", {}, "--task copa: expected a causal model, got a masked one"),
        (
            "opt",
            "sst2",
            {"batch_size": 25},
            "--batch-size: expected at most 24, the number of .*, got 25",
        ),
        (
            "opt",
            "sst2",
            {"max_tokens": 129},
            "--max-tokens: expected at most 128, .* model can read, got 129",
        ),
        (
            "opt",
            "sst2",
            {"model_kind": "masked"},
            "--model: expected .* masked language model .*opt models can be causal$",
        ),
        ("opt", "sst2", {"dev_examples": 32}, "--train-examples: expected 1 to 0"),
    ):
        options = options_of(model, task) | change
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments(options))
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and re.search(message, lines[-1]), lines
        assert not Path(options["out"]).exists()
