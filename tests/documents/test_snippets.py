"""The documents are programs: what a reader would type runs as it is written, in reading order and in one folder."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import snippets
import torch

pytest.importorskip("rich")

import zo_kernels as zo
from benchmarks.__main__ import parser as benchmarks_parser
from benchmarks.bench.registry import select, suite
from zo_kernels.finetune import cli
from zo_kernels.finetune.runs import report, train

ROOT = Path(__file__).parents[2]
READING_ORDER = ["README.md", *re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text())]
DOCUMENTS = [ROOT / name if name == "README.md" else ROOT / "docs" / name for name in dict.fromkeys(READING_ORDER)]


def tokens(number: int) -> dict[str, torch.Tensor]:
    """A batch that the tiny language models can read."""
    ids = torch.randint(5, 300, (2, 8), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def loaded() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained("facebook/opt-125m", dtype=torch.float32).eval()


def of_readme() -> dict[str, Any]:
    rows = [{name: row[0] for name, row in tokens(number).items()} for number in range(6)]
    return {"batches": [tokens(number) for number in range(6)], "train": rows, "dev": rows}


def of_loops() -> dict[str, Any]:
    return {"model": loaded(), "batches": [tokens(number) for number in range(6)]}


def of_methods() -> dict[str, Any]:
    model = loaded()
    full = [tokens(number) for number in range(4)]
    return {
        "zo": zo, "model": model, "closure": lambda: model(**tokens(0)).loss,
        "full_closure": lambda: sum(model(**batch).loss for batch in full) / len(full),
    }  # fmt: skip


def of_reliability() -> dict[str, Any]:
    model = loaded()
    torch.save(model.state_dict(), "as-it-starts.pt")
    loss_of = lambda model, batch: model(**batch).loss  # noqa: E731
    return {"torch": torch, "zo": zo, "model": model, "batch_of": tokens, "steps": 6, "loss_of": loss_of}


def of_trainer() -> dict[str, Any]:
    rows = [{"input_ids": tokens(number)["input_ids"][0], "labels": number % 2} for number in range(6)]
    return {"train": rows, "dev": rows}


def of_tasks() -> dict[str, Any]:
    Path("train.tsv").write_text("label\ttext\n" + "".join(f"{n % 2}\ttext {n}\n" for n in range(60)))
    from zo_kernels.finetune import tasks

    return {name: getattr(tasks, name) for name in ("LM_BFF", "Task", "Template", "_named")}


def of_troubleshooting() -> dict[str, Any]:
    return {"model": loaded(), "batch": tokens(0)}


def of_scale() -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    torch.save(model.state_dict(), "ranks-start.pt")
    batches = [tokens(number) for number in range(4)]
    return {
        "model": model, "batches_of_this_rank": batches, "micro_batches": batches, "batch_on_the_gpu": tokens(0),
    }  # fmt: skip


# What a document speaks of as the reader's own.
OWN = {
    "README.md": of_readme, "methods.md": of_methods, "reliability.md": of_reliability, "trainer.md": of_trainer,
    "tasks.md": of_tasks, "scale.md": of_scale, "troubleshooting.md": of_troubleshooting, "replay.md": of_loops,
    "backends.md": of_loops,
}  # fmt: skip

# Document, what is written, what is run, why.
_SHORT, _NO_GPU = "takes hours", "there need be no GPU: the same code on the CPU"
OTHERWISE = [
    ("README.md", "max_steps=5000", "max_steps=3", _SHORT),
    ("replay.md", "upto=700", "upto=3", _SHORT),
    ("backends.md", '"cuda"', '"cpu"', _NO_GPU),
    ("quickstart.md", "zo-finetune --out runs/demo", "zo-finetune --out runs/demo --steps 2 --eval-every 2", _SHORT),
    ("quickstart.md", "opt.step_count, 3000", "opt.step_count, 300", _SHORT),
    ("trainer.md", "max_steps=5000", "max_steps=3", _SHORT),
    ("trainer.md", "upto=700", "upto=3", _SHORT),
    ("tasks.md", "--steps 500", "--steps 4 --eval-every 2", _SHORT),
    ("tasks.md", "--step 300", "--step 3", _SHORT),
    ("tasks.md", "--steps 20000", "--steps 2", _SHORT),
    ("tasks.md", "--eval-every 4000", "--eval-every 2", _SHORT),
    ("tasks.md", "--steps 2000 ", "--steps 2 --eval-every 2 --dev-examples 4 ", _SHORT),
    ("scale.md", 'execution_device="cuda"', 'execution_device="cpu"', _NO_GPU),
]
# Runs that Ctrl-C ends after so many steps, so that --resume has something to do.
STOPPED = {"runs/texts": 2, "runs/mine": 35}
# Indented blocks that nobody types: equations, what is printed, lists of folders.
TEXTS = {
    "why.md": ["g = (L("],
    "noise.md": ["key     =", "d = bits(y)", "t ← decay", "h  =", "dieharder -a", "(x0, x1", "(y0, y1"],
    "design.md": ["w ← round", "csrc/"],
    "scale.md": ["RanksDiffer: ranks", "RankLost: ranks"],
}
# Words that begin lines which are not of this project, and packages that are not.
NOT_OURS = ("ls", "python3.12", "/tmp/build/bin/python")
PACKAGES = ("zotitan", "torchzero", "setuptools", "pybind11")
# What the reader is promised to see, as far as it is the same on every processor.
PRINTED = {"why.md": ["0.01017", "0.01003", "0.01012"], "quickstart.md": ["end 0.8"]}


def of_a_7b_model(out: str) -> list[tuple[float, float]]:
    """What docs/memory.md prints: gigabytes and seconds, row by row."""
    return [
        (float(size), float(seconds)) for size, seconds in re.findall(r"^\D.* ([\d.]+) +([\d.]+)$", out, re.MULTILINE)
    ]


def in_first_table(readme: str) -> list[tuple[float, float]]:
    """The same of the README's first table."""
    found = []
    for row in re.findall(r"^\| \W*(?:AdamW|LoRA|MeZO|zo_kernels).*$", readme, re.MULTILINE)[:5]:
        sizes, seconds = (re.findall(r"\d+\.\d+", cell) for cell in row.split("|")[2:4])
        found += zip(map(float, sizes), map(float, seconds), strict=True)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The reader's."""
    for name in ("transformers", "accelerate", "matplotlib"):
        pytest.importorskip(name)
    datasets = pytest.importorskip("datasets")
    import tiny_hub

    path = tiny_hub.fill(tmp_path_factory.mktemp("reader"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("zo_kernels.finetune.classifier.learner.minilm_folder", lambda: path / "MODEL_FOLDER_OR_HUB_ID")
        patch.setattr(report, "draw_curves", lambda records, path: None)  # takes longer than all the rest
        if not torch.cuda.is_available():  # a step has the bits of its graph
            patch.setattr(zo.ZeroOrderOptimizer, "graphed", lambda opt, closure: lambda: opt.step(closure))
        yield path


@pytest.fixture
def desk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The reader sits there; afterwards no group of ranks is left, nor what accelerate remembers of it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # they would wait for other tests' threads
    yield folder
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def launched(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun would say to one rank."""
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with patch.context() as environment:
        for name, value in told.items():
            environment.setenv(name, value)
        yield


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_is_a_program(document: Path, desk: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [block for block in snippets.blocks(document.read_text()) if block.kind != snippets.TEXT]
    if not found:
        pytest.skip("has no code")
    names: dict[str, object] = {"__name__": "reader", **OWN.get(document.name, dict)()}
    for block in found:
        block = snippets.Block(block.kind, as_run(document.name, block.text), block.line)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", category=UserWarning, module="reader|zo_kernels")  # of ours
            if block.kind == snippets.PYTHON:
                with launched(monkeypatch) if "init_process_group()" in block.text else monkeypatch.context():
                    snippets.run(block, names, document)
            else:
                for words in block.commands:
                    command(words)
    out = capsys.readouterr().out
    assert all(text in out for text in PRINTED.get(document.name, [])), out
    if document.name == "memory.md":  # what a forward keeps differs a little between versions of transformers
        printed, told = of_a_7b_model(out), in_first_table((ROOT / "README.md").read_text())
        assert len(told) == 7 and printed == [pytest.approx(row, rel=0.03) for row in told], printed


def as_run(document: str, text: str) -> str:
    for name, written, run, _ in OTHERWISE:
        if name == document:
            text = text.replace(written, run)
    return text


def command(words: list[str]) -> None:
    """Run zo-finetune; look at the others."""
    if words[0] == "zo-finetune":
        after = STOPPED.get(words[-1]) if words[-2] == "--out" and "replay" not in words else None
        with stopped(after) if after else nullcontext():
            assert cli.main(words[1:]) == (130 if after else 0), words
    else:
        looked_at(words)


@contextmanager
def stopped(after: int) -> Iterator[None]:
    """By Ctrl-C."""
    step = train.Stepper.step

    def stopping(stepper: Any, factor: float) -> Any:
        if stepper._optimizer.step_count == after:
            raise KeyboardInterrupt
        return step(stepper, factor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Stepper, "step", stopping)
        yield


def looked_at(words: list[str]) -> None:
    """What a command names is there: its target, extra, suite and cases, file."""
    words = [word for word in words if not re.match(r"[A-Z_]+=\S", word) or words[0] == "make"]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            known = rf"^{word.split('=')[0]} \?=" if "=" in word else rf"^\.PHONY:.* {re.escape(word)}\b"
            assert re.search(known, makefile, re.MULTILINE), words
    elif words[0] == "pip" or words[1:3] == ["-m", "pip"]:
        for word in words[words.index("install") + 1 :]:
            installable(word)
    elif words[0].startswith("python") and words[1:3] == ["-m", "benchmarks"]:
        benchmark(words[3:])
    elif words[0] == "pytest" or words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words
    else:
        assert words[0] in NOT_OURS, words


def installable(word: str) -> None:
    """An extra of ours, or a package that is spoken of."""
    ours = re.fullmatch(r"(?:\.|zo_kernels)(?:\[(\w+)\])?", word)
    if ours:
        extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        assert ours[1] is None or re.search(rf"^{ours[1]} = ", extras, re.MULTILINE), word
    else:
        assert word == "--no-deps" or word in PACKAGES or word in (ROOT / "Makefile").read_text(), word


def benchmark(words: list[str]) -> None:
    """Options are known, files are there, cases are found."""
    names = [
        name for word in words for name in (sorted(map(str, ROOT.glob(word))) if word.endswith("*.csv") else [word])
    ]
    options = benchmarks_parser().parse_args(names)
    for name in [*getattr(options, "files", []), *getattr(options, "documents", [])]:
        assert (ROOT / name).exists(), words
    if getattr(options, "only", None):
        assert select(suite(options.suite).cases(options), options.only), words


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda path: path.name
)
def test_commands_in_prose_are_there(document: Path) -> None:
    for text in snippets.in_prose(document.read_text()):
        words = text.replace("...", "").split()
        known: Any = None
        if words[0] == "zo-finetune":
            made = {"sweep": cli.sweep_parser, "replay": cli.replay_parser}.get("".join(words[1:2]), cli.parser)
            known = made()._option_string_actions
        elif words[:3] == ["python", "-m", "benchmarks"]:
            (choices,) = (action for action in benchmarks_parser()._actions if action.choices)
            assert not words[3:] or words[3] in choices.choices, text
            known = choices.choices[words[3]]._option_string_actions if words[3:] else None
        elif words[0] in ("make", "pip"):
            looked_at(shlex.split(text))
        if known is not None:
            assert all(word in known for word in words if word.startswith("--")), text


@pytest.mark.parametrize(
    "text, told",
    [
        ("```python\nvalue = 1\n\nvalue + 1  # 3\n```\n", r"line 4.*got 2"),
        ("```python\nunknown\n```\n", "line 2.*'unknown' is not defined"),
        ('```python\n"a": unknown,\n```\n', "line 2.*'unknown' is not defined"),
        ("    make nothing\n", "make"),
        ("    pip install '.[nothing]'\n", "nothing"),
        ("    python -m benchmarks exactness --only nothing\n", "nothing"),
        ("    python -m pytest tests/nothing.py\n", "nothing"),
        ("    torchrun nothing.py\n", "torchrun"),
    ],
)
def test_what_is_wrong_is_found(text: str, told: str) -> None:
    (block,) = snippets.blocks("\n" + text if text.startswith("    ") else text)
    with pytest.raises((AssertionError, snippets.Failed), match=told):
        if block.kind == snippets.PYTHON:
            snippets.run(block, {}, Path("a.md"))
        else:
            command(*block.commands)


def test_what_is_the_readers_own_is_spoken_of(desk: Path) -> None:
    for name, own in OWN.items():
        (document,) = (path for path in DOCUMENTS if path.name == name)
        code = "".join(block.text for block in snippets.blocks(document.read_text()) if block.kind == snippets.PYTHON)
        assert all(re.search(rf"\b{word}\b", code) for word in own()), name


def test_what_is_run_otherwise_is_written_somewhere() -> None:
    for name, written, run, why in OTHERWISE:
        (document,) = (path for path in DOCUMENTS if path.name == name)
        assert written != run and why
        assert any(written in block.text for block in snippets.blocks(document.read_text())), (name, written)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_that_are_not_run_are_known(document: Path) -> None:
    texts = [block.text for block in snippets.blocks(document.read_text()) if block.kind == snippets.TEXT]
    known = TEXTS.get(document.name, [])
    assert len(texts) == len(known) and all(map(str.startswith, texts, known)), texts


def test_documents_share_no_files() -> None:
    """So that whoever goes through all of them in one folder meets nothing of another's."""
    owners: dict[str, str] = {}
    for document in DOCUMENTS:
        text = "".join(block.text for block in snippets.blocks(document.read_text()))
        for name in set(re.findall(r"[\w./-]+\.(?:zo|pt)\b|runs/[\w-]+", text)):
            assert owners.setdefault(name, document.name) == document.name, name
