"""What runs on a GPU, as far as a machine without one can tell: traces, batches, the order and limits of the parts."""

import json
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import zo_kernels as zo
from benchmarks import cases_profile, everything, launches, whole_suite
from benchmarks.__main__ import main, parser
from benchmarks.graphed import graphed
from benchmarks.step_check import WrongWeights
from benchmarks.step_methods import Method
from benchmarks.timing import Call, Timer
from zo_kernels import ops

CPU = torch.device("cpu")


def span(name, ts, dur=1.0, cat="cuda_runtime", correlation=None):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "args": {"correlation": correlation}}


def mark(name, ts, dur):
    return span(name, ts, dur, "user_annotation")


TRACE = [
    {"ph": "M", "name": "process_name"},
    mark(launches.STEP, 100, 900),
    mark("benchmark: passes", 200, 50),
    mark("benchmark: passes", 600, 50),
    mark("benchmark: forwards", 300, 300),
    mark("benchmark: passes", 400, 20),  # within a forward
    span("cuLaunchKernelEx", 50),  # before the step
    span("cudaLaunchKernel", 210, correlation=1),
    span("cuLaunchKernel", 249),
    span("cudaLaunchKernelExC_v11060", 410),
    span("cudaLaunchKernel", 320),  # the forward's own
    span("cudaMemcpyAsync", 330, correlation=2),
    span("Memcpy DtoH (Device -> Pageable)", 2000, cat="gpu_memcpy", correlation=2),
    span("cudaStreamSynchronize", 331),
    span("cudaMemcpyAsync", 700, correlation=3),
    span("Memcpy DtoH (Device -> Pageable)", 2001, cat="gpu_memcpy", correlation=3),
    span("cudaStreamSynchronize", 701),
    span("cudaEventSynchronize", 415),  # of a pass within a forward
    span("cudaDeviceSynchronize", 1500),  # after the step
]


def test_launches_and_waits_of_a_trace():
    assert launches.count(TRACE) == {
        "pass_launches_per_step": 3,
        "synchronisations_per_step": 2,
        "synchronised_by": "cudaEventSynchronize cudaStreamSynchronize",
        "copies_to_host_per_step": 1,
        "forward_synchronisations_per_step": 1,
    }


def test_on_a_cpu_there_is_nothing_to_count():
    found = launches.counted(lambda: None, CPU, 1)
    assert set(found) == set(launches.count([])) and set(found.values()) == {None}


class Event:
    """A clock that calls advance, as CUDA's events would."""

    now = 0.0

    def __init__(self, enable_timing):
        pass

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3

    def synchronize(self):
        pass


@pytest.mark.parametrize(("seconds", "batch"), [(1.0, 1), (0.95e-4, 10), (1e-7, 20)])
def test_short_calls_are_timed_in_batches_after_a_flush_each(monkeypatch, seconds, batch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls = []

    class Flush:
        def zero_(self):
            calls.append("flush")
            Event.now += 0.5

    def run():
        calls.append("call")
        Event.now += seconds

    timer = Timer(CPU)
    timer._flush = Flush()
    call = Call(run)
    timer.sample(call)
    calls.clear()
    sample = timer.sample(call)
    assert calls == ["flush", "call"] * batch
    assert sample.seconds == pytest.approx(seconds, rel=1e-3) and sample.launch_seconds > 0


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
@pytest.mark.parametrize("wrong", [False, True])
def test_repeated_steps_are_checked(model, monkeypatch, dtype, sparsity, wrong):
    model.to(dtype)
    x = torch.randn(16, 20, dtype=dtype)
    made = zo.SparseMeZO if sparsity else zo.MeZO

    def repeat(optimizer, closure, warmup):
        """In place of a graph: a step, after which a weight of a wrong one is off."""

        def step():
            optimizer.step(closure)
            if wrong:
                model[2].bias.data += 0.5

        return step

    monkeypatch.setattr(zo.ZeroOrderOptimizer, "graphed", repeat, raising=False)
    make = partial(graphed, Method(made, sparsity=sparsity), model, lambda: model(x).float().square().mean(), None, CPU)
    if wrong:
        with pytest.raises(WrongWeights, match=r"1 weights off, first in 2\.bias"):
            make()
    else:
        make()()


def test_the_summary_s_skipped_tests_are_counted():
    summary = [
        "SKIPPED [3] tests/test_cuda.py:12: PyTorch sees no GPU here\n",
        "SKIPPED [1] tests/test_gpu.py:9: peft is not installed\n",
        "SKIPPED [2] tests/test_a.py: needs CUDA\n",
        "1 passed, 6 skipped in 3s\n",
    ]
    assert whole_suite.skipped(summary) == (6, 5)
    without = whole_suite.verdict(summary, None)
    assert without == "PyTorch sees no CUDA GPU here: 5 tests that need one were skipped, 6 in all."
    assert whole_suite.verdict(summary, "a GPU").startswith("On a GPU: 6 tests were skipped")


def test_the_whole_suite_s_status_is_passed_on(tmp_path, capfd):
    (tmp_path / "test_here.py").write_text(
        "import pytest\ndef test_a(): pytest.skip('PyTorch sees no GPU here')\ndef test_b(): assert 0\n"
    )
    assert whole_suite.main([str(tmp_path), "-p", "no:cacheprovider", "-n", "0"]) == 1
    assert "1 tests" in capfd.readouterr().out.splitlines()[-1]


STUB = """
import json, pathlib, sys, time
suite, arguments = sys.argv[1], sys.argv[2:]
if suite == "static": time.sleep(60)
if suite == "step": sys.exit(5)
if "--json" in arguments:
    file = pathlib.Path(arguments[arguments.index("--json") + 1])
    file.write_text(json.dumps([{"case": suite + "/x", "correct": %s}]))
"""


@pytest.mark.parametrize(
    ("gpu", "wrong", "status"),
    [(None, None, 3), (None, "kernels/x, profile/x", 1), ("a GPU", "kernels/x, offload/x, profile/x", 1)],
)
def test_parts_fail_alone_and_wrong_results_are_told(tmp_path, monkeypatch, capfd, gpu, wrong, status):
    correct = wrong is None
    monkeypatch.setattr(everything, "_gpu", lambda: gpu)
    monkeypatch.setattr(everything, "_command", lambda suite: [sys.executable, "-c", STUB % correct, suite])
    (tmp_path / "static.json").write_text('[{"case": "of an earlier run", "correct": false}]')
    assert main(["all", "--out", str(tmp_path), "--minutes", "0.4", "--shape", "tiny", "--elements", "1K"]) == status
    assert not (tmp_path / "static.json").exists() and not (tmp_path / "step.json").exists()
    assert json.loads((tmp_path / "profile.json").read_text())[0]["correct"] is correct
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert told == ([] if correct else [f"WRONG: {wrong}"])


def test_all_parts_end_in_time():
    options = parser().parse_args(["all"])
    for on_gpu in (True, False):
        parts = everything.parts(options, Path("out"), on_gpu=on_gpu)
        offload = ["offload"] if on_gpu else []
        assert [part.suite for part in parts] == ["static", "kernels", "step", *offload, "profile"]
        seconds = 60 * options.minutes
        running = sum(part.share for part in parts) * everything._SLACK + everything._PLOT_SHARE
        assert running * seconds + everything._TO_WRITE_SECONDS * (len(parts) + 1) < 9 * 60
        for part in parts:  # what they are told is what the suites take
            parser().parse_args([part.suite, *part.arguments])
    assert everything._folder("NVIDIA H100 80GB HBM3").parts[-3:] == ("docs", "gpu", "NVIDIA-H100-80GB-HBM3")


def test_profile_saves_traces_and_tables(tmp_path):
    pytest.importorskip("transformers")
    file = tmp_path / "rows" / "profile.json"
    arguments = ["--shape", "tiny", "--elements", "1K", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["profile", *arguments, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    of = {name: [row for row in found if row["case"] == name] for name in ("kernels", "step", "ncu")}
    assert {"plain", "mask=threshold", "dropped=0.75"} <= {row["operation"] for row in of["kernels"]}
    assert {"benchmark: forwards", "benchmark: passes"} <= {row["operation"] for row in of["step"]}
    assert [row["skipped"] for row in of["ncu"]] == ["ncu needs a GPU"]
    for name in ("kernels", "step"):
        trace = json.loads((tmp_path / f"{name}_trace.json").read_text())["traceEvents"]
        assert {row["operation"] for row in of[name]} & {e["name"] for e in trace}
        assert "Self CPU" in (tmp_path / f"{name}_table.txt").read_text()
        for row in of[name]:
            assert row["correct"] is True and 0 <= row["self_cpu_seconds"] <= row["cpu_seconds"] + 1e-9


@pytest.mark.parametrize("name", ["kernels", "step"])
def test_wrong_passes_are_not_profiled(tmp_path, monkeypatch, name):
    if name == "step":
        pytest.importorskip("transformers")
    apply = ops.Table.apply

    def off(table, do):
        apply(table, do)
        table.entries[0].dst.view(-1)[0] += 1e-3

    monkeypatch.setattr(ops.Table, "apply", off)
    arguments = ["--shape", "tiny", "--elements", "1K", "--device", "cpu", "--out", str(tmp_path / "out")]
    file = tmp_path / "profile.json"
    assert main(["profile", *arguments, "--only", name, "--json", str(file)]) == 1
    (row,) = json.loads(file.read_text())
    assert row["correct"] is False and row["operation"] is None and not (tmp_path / "out").exists()


NCU = """"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","axpy","Duration","us","1,234.5"
"0","axpy","Memory Throughput","%","88.5"
"0","axpy","Memory Throughput","Tbyte/s","2.5"
"1","other","Registers Per Thread","register/thread","64"
"""


def test_ncu_s_table_is_read():
    first, second = cases_profile._ncu_rows(NCU.splitlines(), Path("table.csv"))
    assert first["operation"] == "axpy" and first["self_device_seconds"] == pytest.approx(1.2345e-3)
    assert first["ncu_memory_percent"] == 88.5 and second["ncu_registers"] == 64


REFUSED = "==ERROR== ERR_NVGPUCTRPERM - no permission"


@pytest.mark.parametrize(
    ("status", "out", "expected"),
    [
        (0, "==PROF== Connected\n" + NCU, {"correct": True}),
        (1, REFUSED, {"skipped": f"ncu ended with 1: {REFUSED}"}),
        (1, "WRONG 1 of the elements\n", {"correct": False, "wrong": "WRONG 1 of the elements"}),
    ],
)
def test_ncu_is_run_and_its_refusal_is_a_reason(tmp_path, monkeypatch, status, out, expected):
    done = Namespace(returncode=status, stdout=out, stderr="")
    monkeypatch.setattr(cases_profile.subprocess, "run", lambda *a, **k: done)
    options = Namespace(out=str(tmp_path), elements=64, dtype="bf16", backend=None)
    rows = cases_profile._ncu(options)
    assert {name: rows[0][name] for name in expected} == expected
    assert (tmp_path / "ncu_table.csv").exists() == (status == 0)


def test_the_host_s_microseconds_stand_beside_a_check(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from benchmarks.host import cases, stand_ins

    monkeypatch.setattr(cases, "_LAYERS", 2)
    file = tmp_path / "host.json"
    only = "^(nothing|cuda)/in_forward|^native/in_place"
    arguments = ["host", "--device", "cpu", "--only", only, "--rounds", "2", "--seconds", "0", "--json", str(file)]
    assert main(arguments) == 0
    found = {row["case"]: row for row in json.loads(file.read_text())}
    assert len(found) == 5
    for name, row in found.items():
        assert row["correct"] is True and row["launches"] == ("real" if name.startswith("native") else "none")
        assert row["modules"] == 2 * 8 + 4 and row["weights"] == 2 * 16 + 4
        own = row["step_us"] - row["forwards_us"]
        assert row["ours_us_per_step"] == pytest.approx(own) and row["ours_us_per_module"] == pytest.approx(own / 40)
    passes = {name: row["passes_per_step"] for name, row in found.items()}
    assert passes["cuda/in_forward/one by one"] == 2 * 20 + 1 and passes["native/in_place"] == 3
    assert passes["nothing/in_forward/together"] == 2 * 6 + 1  # embeddings, two blocks, the last norm, the head

    monkeypatch.setattr(stand_ins._Extension, "axpy", lambda *_: None)
    assert main(["host", "--device", "cpu", "--only", "^cuda/in_place", "--json", str(file)]) == 1
    assert json.loads(file.read_text())[0]["wrong"] == "3 passes made 0 launches"
