"""`gpu`: its stages ask for what there is, a dry run goes through all of them, and what comes back becomes a page."""

import json
import os
import re
import subprocess
import sys
import tarfile
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import main, parser
from benchmarks.bench import plot, registry
from benchmarks.bench.document import ROOT
from benchmarks.gpu import SECONDS, bits, machine, packed, page, plan
from zo_kernels import backends

# Without either, a matrix has no backend of a GPU.
INTERPRETS = torch.cuda.is_available() or "triton" in backends.available(torch.device("cpu"))
GPU, TOY = plan.stages(plan.of_gpu(16)), plan.stages(plan.toy())


def suites(stages):
    return [stage for stage in stages if stage.suite]


def test_the_stages_fit_the_time(capsys):
    assert sum(stage.expected for stage in GPU) <= SECONDS
    assert all(stage.expected <= 0.8 * stage.limit for stage in GPU)
    names = [stage.name for stage in GPU]
    assert len(set(names)) == len(names) and names == [stage.name for stage in TOY]
    assert [stage.name for stage in GPU if stage.vital] == ["machine"] == names[:1] and "large" in names[-1]
    assert main(["gpu", "--plan"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in names) and f"{SECONDS:g} s for everything" in shown


def chosen(stage):
    options = parser().parse_args(stage.arguments(10.0, "folder")[2:])
    return [case.name for case in registry.select(registry.suite(options.suite).cases(options), options.only)]


def test_stages_ask_suites_for_cases_that_there_are():
    found = {}
    for stages in (TOY, GPU):
        found = {stage.name: chosen(stage) for stage in suites(stages)}
        assert all(found.values())
    signs = "distribution=rademacher"
    harder = ("rounding=stochastic", "mask=record", signs, f"directions=8/{signs}")
    for backend in ("triton", "cuda"):
        wanted = {f"{dtype}/{backend}" for dtype in ("fp32", "bf16")} | {f"bf16/{backend}/{kind}" for kind in harder}
        assert wanted == {name for name in found["bandwidth"] if f"/{backend}" in name}
    methods = ("MeZO", "SparseMeZO", "MeZO/in_forward")
    assert found["step"] == [f"opt-1.3b/{name}" for name in methods]
    assert found["step-cuda"] == ["opt-1.3b/MeZO", "opt-1.3b/MeZO/in_forward"]
    assert len(found["cpu"]) == 2 and found["profile"] == ["step"] and found["ncu-cuda"] == ["ncu"]


class Collected:
    def pytest_collection_finish(self, session):
        self.names = [item.nodeid for item in session.items]


@pytest.mark.skipif(not INTERPRETS, reason="Triton runs neither a GPU nor its interpreter here")
def test_stages_ask_pytest_for_tests_that_there_are(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = {}
    for which, stages in (("toy", TOY), ("gpu", GPU)):
        for stage in stages:
            if stage.is_tests:
                words = list(stage.command[2 : stage.command.index("-k") + 2])
                collected = Collected()
                assert pytest.main([*words, "--collect-only", "-p", "no:xdist"], [collected]) == 0
                found[which, stage.name] = collected.names
    matrix = found["gpu", "matrix"]
    assert any("test_known_answers" in name for name in matrix) and any("test_matrix" in name for name in matrix)
    assert all("triton" in name or "cuda" in name for name in matrix)
    assert len(found["toy", "matrix"]) < len(matrix)
    assert len(found["gpu", "steps"]) > 50 and not any("2_31" in name for name in found["gpu", "steps"])
    for backend in ("triton", "cuda"):
        (name,) = found["gpu", f"large-{backend}"]
        assert backend in name and name not in found["gpu", "steps"]


def dry_run(tmp_path, names, more=()):
    """The rows of suites' stages, in this process, which has PyTorch already."""
    told = {}
    for stage in suites(plan.stages(replace(plan.toy(), compared="16"))):
        if stage.name in names:
            assert main([*stage.arguments(60.0, str(tmp_path))[2:], *more]) == 0, stage.name
            found = json.loads((tmp_path / f"{stage.name}.json").read_text())
            assert all(row["device_name"] for row in found if row["correct"])
            told[stage.name] = found
    return told


def ran(rows):
    return [row["case"] for row in rows if row["correct"]]


def test_suites_of_a_dry_run(tmp_path, capsys):
    told = dry_run(tmp_path, {"bits"}, ["--only", "^native|/noise/bf16"])  # Triton's passes are in test_matrix.py
    told |= dry_run(tmp_path, {stage.name for stage in suites(TOY)} - {"bits"} - OF_MODELS)
    assert ran(told["machine"]) and ("triton/noise/bf16" in ran(told["bits"])) == INTERPRETS
    bf16 = "bf16/native:scalar"
    assert set(ran(told["bandwidth"])) == {"fp32/native:scalar", bf16, f"{bf16}/distribution=rademacher"}
    assert [row["skipped"] for row in told["ncu-cuda"]] == ["ncu needs a GPU"]
    assert {row["skipped"] for row in told["tuning"]} == {"PyTorch sees no GPU here"} and len(told["tuning"]) == 7


OF_MODELS = {"host", "step", "step-cuda", "profile", "offload"}


def test_steps_of_a_dry_run(tmp_path, capsys, unwatched_memory):
    pytest.importorskip("transformers")
    told = dry_run(tmp_path, OF_MODELS)
    assert set(told) == OF_MODELS and "nothing/in_forward/together" in ran(told["host"])
    methods = ("MeZO", "SparseMeZO", "MeZO/in_forward")
    assert list(dict.fromkeys(ran(told["step"]))) == [f"opt-tiny/{name}" for name in methods]
    assert len(ran(told["profile"])) > 10 and ran(told["offload"]) == ["opt-tiny"]
    assert len(told["step-cuda"]) == 2 and all("'cuda' cannot run here" in row["skipped"] for row in told["step-cuda"])


def test_tests_of_a_dry_run(tmp_path):
    """As the run has them, in processes: all pass, or are skipped for want of a GPU."""
    for stage in TOY:
        if stage.is_tests and stage.name not in ("large-cuda", "steps"):  # as large-triton
            command = [sys.executable, *stage.arguments(60.0, str(tmp_path))]
            env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            assert (" passed" in done.stdout) == (stage.name == "matrix") and "FAILED" not in done.stdout


# What the machine with the GPU may not have: hidden from every process whose path this file is on.
HIDDEN = """
from importlib.machinery import PathFinder
from types import MethodType
find = PathFinder.find_spec
hidden = ("rich", "matplotlib", "scipy", "sklearn", "accelerate", "peft", "datasets")
def visible(cls, name, *more, **named):
    return None if name.partition(".")[0] in hidden else find(name, *more, **named)
PathFinder.find_spec = MethodType(visible, PathFinder)
"""


def test_a_dry_run_comes_back_as_a_page(tmp_path, capsys, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    assert main(["gpu", "--dry-run", "--out", str(out), "--only", "^bandwidth$"]) == 0
    assert os.listdir(out) == ["gpu.tgz"]
    shown = capsys.readouterr().out
    assert re.search(r"^bandwidth +ok +\d+ +90 +10 of 22 rows are correct", shown, re.MULTILINE)
    assert "\nbenchmarks kernels\n" in shown and "\nfp32/native:scalar" in shown

    file = str(out / "gpu.tgz")
    assert main(["gpu", "--read", file]) == 2 and "expected --into FOLDER" in capsys.readouterr().err
    assert not list(ROOT.glob("docs/gpu/dry-run*"))
    assert main(["gpu", "--read", file, "--into", str(tmp_path / "pages")]) == 0
    (folder,) = (tmp_path / "pages").iterdir()
    text = (folder / "README.md").read_text()
    assert folder.name.startswith("dry-run-") and "no figure here says anything about a GPU" in text
    assert "| fp32/native:scalar | 4K |" in text and "## step" not in text and "python -m benchmarks kernels" in text
    assert main(["evidence", "--check", str(folder / "README.md")]) == 0


def packed_run(tmp_path, found, stages=None, **more):
    """What a run would have packed that found these rows."""
    folder = tmp_path / "found"
    folder.mkdir()
    for stage, own in found.items():
        (folder / f"{stage}.json").write_text(json.dumps(own))
    ended = {"seconds": 1.0, "limit": 2.0, "lines": [], "command": "the command"}
    run = {
        "format": packed.FORMAT, "dry_run": False, "commit": "0" * 40, "began_utc": "2026-01-02T03:04:05+00:00",
        "planned": [*found, "offload"],
        "stages": [{"name": name, "suite": SUITE.get(name, name), "status": "ok", **ended} for name in found],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({**run, **more}))
    packed.pack(folder, tmp_path / "gpu.tgz")
    return str(tmp_path / "gpu.tgz")


H100 = "NVIDIA H100 80GB HBM3"
MACHINE = {
    "case": "machine", "correct": True, "skipped": None, "device_name": H100, "driver": "580.1", "torch_version": "2",
    "triton_version": None, "cores": 16,
}  # fmt: skip
PASS = {
    "case": "bf16/triton", "correct": True, "wrong": None, "skipped": None, "elements": 2**30, "gelem_per_s": 700.5,
    "seconds_median": 1.5e-3, "gb_per_s": 2802.0, "share_of_copy": 0.934, "baseline": "eager",
    "baseline_seconds_median": 8e-3, "ratio": 5.25, "ratio_p10": 5.1, "ratio_p90": 5.5, "ratio_of": "whole",
    "launch_seconds_median": None,
}  # fmt: skip
NCU = {
    "case": "ncu", "correct": True, "skipped": None, "backend": "cuda", "operation": "axpy", "kind": None, "calls": 1,
    "self_device_seconds": 1e-3, "ncu_memory_percent": 93.25, "saved": "/tmp/some where/profile/ncu_cuda_table.csv",
}  # fmt: skip
SUITE = {"bandwidth": "kernels", "ncu-cuda": "profile", "ncu-triton": "profile"}
FOUND = {
    "machine": [MACHINE],
    "bits": [{"backend": b, "compared_with": "native:avx2", "correct": b == "cuda", "skipped": None, "elements": 8,
              "wrong": "3 of 8 elements differ", "case": b} for b in ("triton", "cuda")],
    "bandwidth": [PASS, {**PASS, "case": "bf16/cuda", "correct": False, "gb_per_s": 1234.5, "share_of_copy": 0.4115}],
    "step": [{"case": "opt-1.3b/MeZO", "correct": None, "skipped": "transformers is not installed"}],
    "ncu-triton": [{"case": "ncu", "correct": None, "skipped": "ncu is not installed"}],
    "ncu-cuda": [NCU],
}  # fmt: skip


def test_a_page_of_a_gpu_tells_what_is_right_and_what_is_not(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "run", lambda files, out: drawn.extend(files))
    monkeypatch.setattr(page, "INTO", tmp_path / "docs")
    folder = tmp_path / "docs" / "NVIDIA-H100-80GB-HBM3"
    folder.mkdir(parents=True)
    (folder / "of-an-earlier-run.csv").write_text("")
    assert main(["gpu", "--read", packed_run(tmp_path, FOUND)]) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith(f"# {H100}\n") and "dry run" not in text and "580.1" in text and "0" * 40 in text
    assert "Failed or missing: offload." in text and "| offload | not begun |  |  |  |" in text
    assert "| bf16/triton | 1G | 1.50 | 700.500 | 2802.00 | 93% | yes | eager | 8.00 | 5.25 (5.10 to 5.50) |" in text
    assert "1234" not in text and "41%" not in text  # of the pass that was wrong
    assert "| cuda | 8 | native:avx2 | yes |" in text and "| triton | 8 |" not in text
    assert "## step" not in text and "ncu-triton.csv" not in text  # nothing of them is right
    assert text.count("    the command\n") == 3 and "93.2" in text
    assert {os.path.basename(f) for f in drawn} >= {"bandwidth.csv", "static.csv", "stages.csv"}
    assert "/tmp" not in (folder / "ncu-cuda.csv").read_text()
    assert not (folder / "of-an-earlier-run.csv").exists() and main(["evidence", "--check", f"{folder}/README.md"]) == 0


def archive(tmp_path, name, text):
    (tmp_path / "member").write_text(text)
    file = tmp_path / f"{len(os.listdir(tmp_path))}.tgz"
    with tarfile.open(file, "w:gz") as tar:
        tar.add(tmp_path / "member", name)
    return str(file)


def test_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "text").write_text("no archive")
    run = {"format": packed.FORMAT, "planned": ["../../stolen"], "stages": [], "dry_run": False}
    for file, said in (
        (str(tmp_path / "text"), "got something else"),
        (str(tmp_path / "none"), "got no file"),
        (archive(tmp_path, "a/b", ""), "got an archive without run.json"),
        (archive(tmp_path, "run.json", '{"format": "other"}'), "in the format 'zo_kernels gpu run 2', got 'other'"),
        (archive(tmp_path, "run.json", json.dumps(run)), "got a stage '../../stolen'"),
        (archive(tmp_path, "../run.json", "{}"), "got something else"),
        (packed_run(tmp_path, {"bits": []}), "expected a run whose stage machine told what it ran on"),
    ):
        assert main(["gpu", "--read", file, "--into", str(tmp_path / "pages")]) == 2
        error = capsys.readouterr().err
        assert said in error and "expected a" in error
    assert not (tmp_path / "pages").exists()


@pytest.mark.parametrize("what", ["noise", "Table"])
@pytest.mark.parametrize("only", ["bf16$", "bf16/rademacher$"])
def test_bits_that_differ_are_told(monkeypatch, what, only):
    right = getattr(bits, what)

    def off(*arguments, backend, **options):
        z = right(*arguments, backend=backend, **options)
        if backend == "native:scalar":
            z.view(torch.int16)[5] ^= 1
        return z

    def table(entries, names, backend):
        made = right(entries, names, backend)
        apply = made.apply

        def wrong(do):
            apply(do)
            if backend == "native:scalar":
                entries[0].dst.view(torch.int16)[5] ^= 1

        return Namespace(apply=wrong)

    monkeypatch.setattr(bits, "_COMPARED", ("native:scalar",))
    monkeypatch.setattr(bits, "_TRUSTED", ("reference",))
    options = parser().parse_args(["bits", "--device", "cpu", "--elements", "64", "--only", only])
    cases = registry.select(bits.cases(options), options.only)
    assert [case.measure()[0]["correct"] for case in cases] == [True, True]
    monkeypatch.setattr(bits, what, off if what == "noise" else table)
    wrong, fine = ("noise", "passes") if what == "noise" else ("passes", "noise")
    found = {case.name.split("/")[1]: case.measure for case in cases}
    assert found[fine]() == [{"correct": True}]
    with pytest.raises(registry.Wrong, match=r"^1 of 64 elements differ, first 5, of "):
        found[wrong]()


def test_a_gpu_is_described(monkeypatch):
    seen = Namespace(major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
    monkeypatch.setattr(machine.torch.cuda, "get_device_properties", lambda index: seen)
    monkeypatch.setattr(machine, "_said", lambda pattern, *command: "580.1, 1980, 2619, 700.00")
    told = machine._gpu()
    assert told["compute_capability"] == "9.0" and told["memory_gib"] == 80.0
    assert (told["driver"], told["clock_mhz"], told["power_limit_w"]) == ("580.1", "1980", "700.00")
    monkeypatch.setattr(machine, "_said", lambda pattern, *command: None)
    assert "driver" not in machine._gpu()
    (case,) = machine.cases(Namespace(device="cuda"))
    assert torch.cuda.is_available() or case.skipped == "PyTorch sees no GPU here"
