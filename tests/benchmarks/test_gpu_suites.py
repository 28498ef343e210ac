"""What runs on a GPU, as far as a machine without one can tell: traces, batches, graphed steps, ncu."""

import json
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import zo_kernels as zo
from benchmarks.__main__ import main
from benchmarks.bench.registry import Unavailable, Wrong
from benchmarks.bench.timing import Call, Timer
from benchmarks.kernels.kernel_call import KernelCall
from benchmarks.profile import cases as cases_profile
from benchmarks.profile import ncu_target
from benchmarks.step import launches
from benchmarks.step.graphed import graphed
from benchmarks.step.methods import Method

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

    def repeat(optimizer, closure, warmup, same_bits):
        """In place of a graph: a step, after which a weight of a wrong one is off."""

        def step():
            optimizer.step(closure)
            if wrong:
                model[2].bias.data += 0.5

        return step

    monkeypatch.setattr(zo.ZeroOrderOptimizer, "graphed", repeat, raising=False)
    make = partial(graphed, Method(made, sparsity=sparsity), model, lambda: model(x).float().square().mean(), None, CPU)
    if wrong:
        with pytest.raises(Wrong, match=r"1 of \d+ weights looked at are off, first in 2\.bias"):
            make()
    else:
        make()()


def profiled(tmp_path):
    pytest.importorskip("transformers")
    file = tmp_path / "rows" / "profile.json"
    arguments = ["--shape", "tiny", "--threads", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    return main(["profile", *arguments, "--json", str(file)]), json.loads(file.read_text())


def test_profile_saves_a_trace_and_a_table(tmp_path):
    status, (*found, ncu) = profiled(tmp_path)
    assert status == 0 and (ncu["case"], ncu["skipped"]) == ("ncu", "ncu needs a GPU")
    operations = {row["operation"] for row in found}
    assert {"benchmark: forwards", "benchmark: passes"} <= operations
    trace = json.loads((tmp_path / "out" / "step_trace.json").read_text())["traceEvents"]
    assert operations & {e["name"] for e in trace}
    assert "Self CPU" in (tmp_path / "out" / "step_table.txt").read_text()
    for row in found:
        assert row["correct"] is True and 0 <= row["self_cpu_seconds"] <= row["cpu_seconds"] + 1e-9


def test_wrong_passes_are_not_profiled(tmp_path, wrong_passes):
    status, (row, _) = profiled(tmp_path)
    assert status == 1 and row["correct"] is False and row.get("operation") is None and not (tmp_path / "out").exists()


NCU = """"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","axpy","Duration","us","1,234.5"
"0","axpy","Memory Throughput","%","88.5"
"0","axpy","Memory Throughput","Tbyte/s","2.5"
"0","axpy","Achieved Occupancy","%","61.2"
"0","axpy","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","inst","0.5"
"0","axpy","Stall Long Scoreboard","inst","3.25"
"1","other","Registers Per Thread","register/thread","64"
"""


def test_ncu_s_table_is_read():
    first, second = cases_profile._ncu_rows(NCU.splitlines(), Path("table.csv"))
    assert first["operation"] == "axpy" and first["self_device_seconds"] == pytest.approx(1.2345e-3)
    assert first["ncu_memory_percent"] == 88.5 and second["ncu_registers"] == 64
    assert first["ncu_occupancy_percent"] == 61.2 and second["ncu_stalls"] is None
    assert first["ncu_stalls"] == "long_scoreboard 3.25, wait 0.50"


REFUSED = "==ERROR== ERR_NVGPUCTRPERM - no permission"


def test_ncu_is_run_and_its_refusal_is_a_reason(tmp_path, monkeypatch):
    options = Namespace(out=str(tmp_path), elements=64, dtype="bf16", backend=None, kinds="")
    for status, out, raised, told in (
        (1, REFUSED, Unavailable, f"ncu ended with 1: {REFUSED}"),
        (1, "WRONG 1 of the elements\n", Wrong, "WRONG 1 of the elements"),
        (0, "==PROF== Connected\n" + NCU, None, None),
    ):
        done = Namespace(returncode=status, stdout=out, stderr="")
        monkeypatch.setattr(cases_profile.subprocess, "run", lambda *a, done=done, **k: done)
        if raised:
            with pytest.raises(raised) as error:
                cases_profile._ncu(options)
            assert str(error.value) == told and not list(tmp_path.iterdir())
    assert cases_profile._ncu(options)[0]["correct"] and (tmp_path / "ncu_triton_table.csv").exists()


STAND_IN = f"""#!{sys.executable} -IS
import sys
at = sys.argv.index("benchmarks.profile.ncu_target")
assert sys.argv[at - 1] == "-m" and {{"WarpStateStats", "SpeedOfLight", "Occupancy"}} <= set(sys.argv)
open(__file__ + ".txt", "w").write("\\n".join(sys.argv[at + 1 :]))
print({NCU!r})
"""


def test_ncu_runs_the_passes_that_are_asked_for(tmp_path, monkeypatch):
    """With a stand-in for ncu; what it is told to run is run here, on the CPU."""
    (tmp_path / "ncu").write_text(STAND_IN)
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    given = Namespace(out=str(tmp_path), elements=64, dtype="bf16", backend="native:scalar")
    rows = cases_profile._ncu(Namespace(**vars(given), kinds="^(plain|mask=bits)$"))
    assert [(row["kind"], row["correct"]) for row in rows] == [("plain", True), ("mask=bits", True)]
    told = cases_profile.cells(rows[0])
    assert (told["operation"], told["memory %"], told["occupancy %"]) == ("plain", "88.5", "61.2") and len(rows) == 2
    assert "compute %" not in told and told["stalls"].startswith("long_scoreboard 3.25")
    ran = []
    run = KernelCall.run
    monkeypatch.setattr(KernelCall, "run", lambda call: ran.append(call.entries[0].mask.name) or run(call))
    assert ncu_target.main(*(tmp_path / "ncu.txt").read_text().split("\n")) == 0
    assert ran == ["NONE", "NONE", "BITS", "BITS", "NONE", "BITS"]  # twice for the check of each, then once
    with pytest.raises(ValueError, match="expected what is found in one of plain, mask=threshold"):
        cases_profile._ncu(Namespace(**vars(given), kinds="none such"))


def test_the_host_s_microseconds_stand_beside_a_check(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from benchmarks.host import stand_ins

    file = tmp_path / "host.json"
    only = "^(nothing|cuda)/in_forward|^native/in_place"
    sizes = ["--layers", "2", "--device", "cpu", "--rounds", "2", "--seconds", "0", "--json", str(file)]
    assert main(["host", *sizes, "--only", only]) == 0
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
    assert main(["host", *sizes, "--only", "^cuda/in_place"]) == 1
    assert json.loads(file.read_text())[0]["wrong"] == "3 passes made 0 launches"
