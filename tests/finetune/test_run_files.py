"""What is said to files in a run's folder that are not what they should be: nothing is changed, nothing waited for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

for module in ("transformers", "rich", "matplotlib", "safetensors"):
    pytest.importorskip(module)

from tiny_run import rewrite, tree  # noqa: E402

from zo_kernels.finetune.folders import run_folder  # noqa: E402
from zo_kernels.finetune.folders.metrics import Metrics, records_of  # noqa: E402
from zo_kernels.finetune.runs import job  # noqa: E402
from zo_kernels.finetune.sweeps.plan import plan_of  # noqa: E402

Options = dict[str, Any]


LONG = b'{"event": "step", "x": "' + b"a" * (5 << 20) + b'"}\n'
DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected a JSON object"),
    "another encoding": ('{"lr": "ü"}'.encode("utf-16"), "in UTF-8"),
    "a list": (b"[1]", "expected a JSON object, got"),
    "deep": (DEEP, "nested too deeply|recursion"),
    "long": (LONG, "expected at most"),
    "a number of a million digits": (b'{"lr": 1' + b"0" * 1_000_000 + b"}", "expected"),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_contents_that_are_none(run: Path, content: str) -> None:
    data, message = CONTENTS[content]
    for name, read in (
        ("config.json", run_folder.config_of),
        ("start/labels.json", lambda run: run_folder.read_description(run / "start")),
        ("metrics.jsonl", records_of), ("sweep.json", plan_of),
    ):  # fmt: skip
        (run / name).write_bytes(data + b"\n" if name == "metrics.jsonl" else data)
        with pytest.raises(ValueError, match=message) as error:
            read(run)
        assert name in str(error.value) and len(str(error.value)) < 500


def _mkfifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "start/labels.json", "start/head.safetensors"])
def test_what_is_no_file(run: Path, name: str) -> None:
    for change in (
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.rmdir(), path.touch(), _mkfifo(path)),
    ):
        change(run / name)
        with pytest.raises(ValueError, match=f"{name}|expected a file"):
            config = run_folder.config_of(run)
            records_of(run)
            job.load_start(run, config)


STEP = {"event": "step", "step": 1, "loss": 1.0, "lr": 1, "seconds": 1, "forward_seconds": 1, "pass_seconds": 1}
FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"steps": "2"}, "steps: expected a whole number, got '2'"),
    ("config.json", {"steps": 2.0}, "steps: expected a whole number, got 2.0"),
    ("config.json", {"steps": True}, "steps: expected a whole number, got True"),
    ("config.json", {"steps": 10**30}, "steps: expected a whole number"),
    ("config.json", {"steps": 2**40}, "--steps: expected a whole number of at most"),
    ("config.json", {"lr": "fast"}, "--lr: expected a finite number above 0, or auto, got 'fast'"),
    ("config.json", {"lr": 10**400}, "lr: expected a number or a text or null"),
    ("config.json", {"lr": float("nan")}, "--lr: expected a finite number above 0, or auto, got nan"),
    ("config.json", {"model": ["a"]}, "model: expected a text or null, got"),
    ("config.json", {"overwrite": 1}, "overwrite: expected true or false, got 1"),
    ("config.json", {"method": "sgd"}, "--method: expected one of"),
    ("config.json", {"colour": 1}, "'colour': unknown field; was the file written by another version"),
    ("config.json", {"seed": None}, "seed: expected a whole number, but the field is missing"),
    ("config.json", {"threads": 2**30}, "--threads: expected .* at most"),
    ("start/labels.json", {"names": "ab"}, "names: expected a list, each a text"),
    ("start/labels.json", {"names": [1]}, "names: expected a list, each a text"),
    ("start/labels.json", {"names": []}, "names: expected at least one label, got none"),
    ("start/labels.json", {"names": ["a", "b", "c"]}, r"head.safetensors: weight: expected the shape \(3, 16\)"),
    ("start/labels.json", {"max_tokens": -1}, "max_tokens: expected a whole number from 1"),
    ("start/labels.json", {"task": "chess", "kind": "causal"}, "task, kind: expected one of"),
    ("start/labels.json", {"weights": {"../x.safetensors": ""}}, "weights: expected names of .safetensors files"),
    (
        "start/labels.json",
        {"weights": {"head.safetensors": "1-00000000"}},
        "head.safetensors: the file is damaged",
    ),
    ("sweep.json", {"plan": 1}, "plan: expected an object"),
    ("sweep.json", {"settings": {"steps": "2"}}, "settings: steps: expected a whole number"),
    ("sweep.json", {"lr": [[1]]}, "lr: expected a list, each a number or null"),
    ("sweep.json", {"lr": [1.0, 1.0]}, "--lr: expected 1 to 10000 different numbers"),
    ("sweep.json", {"lr": [i + 1.0 for i in range(200)], "eps": [i + 1.0 for i in range(200)]}, "at most 10000 comb"),
    ("sweep.json", {"stop_margin": float("inf")}, "--stop-margin: expected a finite number"),
    ("metrics.jsonl", {"event": "steps"}, "event: expected one of start"),
    ("metrics.jsonl", {**STEP, "batch_seconds": "1"}, "batch_seconds: expected a number, got '1'"),
    ("metrics.jsonl", STEP, "batch_seconds: expected a number, but the field is missing"),
    ("metrics.jsonl", {**STEP, "batch_seconds": 0, "step": -1}, "step: expected a whole number of at least 0"),
    ("metrics.jsonl", {"event": "evaluation", "split": 3}, "evaluation|step|split"),
]


@pytest.mark.parametrize(("name", "change", "message"), FIELDS)
def test_fields_that_are_not_what_they_should_be(run: Path, name: str, change: dict[str, Any], message: str) -> None:
    if name == "metrics.jsonl":
        with (run / name).open("a") as file:
            file.write(json.dumps(change) + "\n")
    elif name == "sweep.json":
        plan = {"out": "x", "settings": {}, "lr": [1.0], "eps": [1.0], "stop_margin": 0.5}
        values = change if "plan" in change else {"plan": {**plan, **change}}
        (run / name).write_text(json.dumps({"runs": [], **values}))
    else:
        rewrite(run / name, **change)
        if name == "config.json" and None in change.values():
            rewrite(run / name, **dict.fromkeys(change))
    before = tree(run)
    with pytest.raises(ValueError, match=message) as error:
        if name == "sweep.json":
            plan_of(run)
        else:
            config = run_folder.config_of(run)
            records_of(run)
            job.load_start(run, config)
    assert (name in str(error.value) or "head.safetensors" in str(error.value)) and tree(run) == before


def test_a_record_that_was_cut_off_is_none(run: Path) -> None:
    whole = records_of(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert records_of(run) == whole
    with Metrics(run, resumed=True) as metrics:
        metrics.begin(2)
    assert [r for r in whole if r["event"] != "summary"] == records_of(run)
