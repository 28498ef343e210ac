"""Steps of every method on tiny models: how they are checked, timed, and compared."""

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("rich")

import zo_kernels as zo
from benchmarks.__main__ import main
from benchmarks.bench import memory
from benchmarks.bench.timing import Watch
from benchmarks.kernels.baselines import EagerPass, published_pass
from benchmarks.step import exact
from benchmarks.step.baseline_steps import Baseline
from benchmarks.step.shapes import SHAPES
from zo_kernels import ops
from zo_kernels.estimators.normalize import Normalizer
from zo_kernels.runs import run as runs

CPU = torch.device("cpu")


@pytest.fixture
def measured(rows_of):
    """Run a suite quickly on a tiny model."""
    pytest.importorskip("transformers")
    return lambda suite, *more: rows_of(suite, "--shape", "tiny", "--threads", "1", *more)


@pytest.fixture
def small(measured, unwatched_memory):
    """The same, where nobody looks at the memory."""
    return measured


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("kind", ["svrg", "fzoo", "masked", "plain"])
def test_baseline_steps_probe_restore_and_descend(published, kind):
    torch.manual_seed(3)
    params = [nn.Parameter(torch.randn(40, 5)), nn.Parameter(torch.randn(60))]
    clean = [p.detach().clone() for p in params]
    thresholds = [0.5, 0.5] if kind == "masked" else [None, None]

    def loss():
        return sum((p**2).sum() for p in params)

    def step(lr):
        passes = published_pass if published else EagerPass(params)
        steps = Baseline(params, passes, not published, loss, Watch(CPU), eps=1e-3, lr=lr, thresholds=thresholds)
        {"svrg": lambda: steps.svrg(3), "fzoo": lambda: steps.fzoo(3)}.get(kind, steps.spsa)()

    step(lr=0.0)
    for p, before in zip(params, clean, strict=True):
        torch.testing.assert_close(p.data, before, rtol=0.0, atol=3e-6)
    before = loss().item()
    for _ in range(30):
        step(lr=1e-3)
    assert loss().item() < before - 1e-3
    if kind == "masked":
        for p, start in zip(params, clean, strict=True):
            torch.testing.assert_close(p.data[start.abs() > 0.6], start[start.abs() > 0.6], rtol=0.0, atol=3e-6)


def test_steps_of_a_tiny_model(measured):
    some = ("FZOO", "LeZO", "MeZOSVRG", "SparseMeZO/in_forward", "MeZOSVRG/in_forward")
    only = f"tiny/({'|'.join(some)})$"
    status, found, table = measured("step", "--only", only, "--directions", "2")
    assert status == 0 and len(table) == len(found)
    assert {row["case"] for row in found} == {f"tiny/{name}" for name in some}
    for row in found:
        assert row["correct"] is True and not any(isinstance(value, (dict, list)) for value in row.values())
        parts = [row[f"{part}_share"] for part in ("forwards", "passes", "other")]
        assert all(0 < share < 1 for share in parts)
        assert row["extra_memory_mib"] <= row["elements"] * 4 / 2**20 + 1
        assert (row["active_share"] < 1) == (row["method"] == "LeZO")
        assert row["forwards_per_step"] == {"FZOO": 2 + 1, "MeZOSVRG": (2 + 4) / 2}.get(row["method"], 2)
        assert row["ratio"] > 0 and row["ratio_of"] == ("passes" if row["baseline"] == "MeZO" else "whole")
        assert row["step_per_forwards"] == pytest.approx(row["seconds_median"] / row["forwards_seconds_median"])
        assert row["peak_memory_mib"] > row["extra_memory_mib"] and row["baseline_step_per_forwards"] > 1
        counted = row["pass_launches_per_step"], row["synchronisations_per_step"]
        if row["device"] == "cpu":  # where there are no launches
            assert counted == (None, None)
        else:
            assert counted[0] > 0 and counted[1] >= 0
        assert row["baseline"] != "in place" or row["perturb"] == "in_forward"
    assert {row["baseline"] for row in found} == {"published passes", "eager passes", "MeZO", "in place"}


@pytest.mark.parametrize("case", ["MeZO", "MeZO/in_forward", "LeZO", "LeZO/in_forward"])
def test_no_timed_step_pays_for_another_s_weights(small, monkeypatch, case):
    """An optimizer whose weights somebody else has changed takes fingerprints: each that is timed has its own."""
    taken, fingerprints = [], runs.weight_setups
    monkeypatch.setattr(runs, "weight_setups", lambda *a: taken.append(1) or fingerprints(*a))
    status, _, _ = small("step", "--only", f"tiny/{case}$")
    assert status == 0 and len(taken) <= 8  # of each optimizer when it begins, of copies that measure memory, too


@pytest.mark.parametrize("case", ["MeZO", "MeZO/in_forward", "LeZO/in_forward", "MeZOSVRG/in_forward"])
def test_a_wrong_step_has_no_time_and_the_run_fails(small, wrong_passes, case):
    status, found, _ = small("step", "--only", f"tiny/{case}$")
    assert status == 1
    assert found[0]["correct"] is False and "at closure call 1 " in found[0]["wrong"]
    assert found[0].get("seconds_median") is None and found[0].get("ratio") is None


def test_steps_along_signs_are_compared_with_normals(measured):
    status, found, _ = measured("step", "--only", "tiny/(MeZO|FZOO/in_forward)/rademacher$", "--directions", "2")
    assert status == 0 and [row["baseline"] for row in found] == ["normals", "published passes"] * 2
    for row in found:
        assert row["correct"] is True and row["distribution"] == "rademacher" and row["ratio"] > 0
        assert row["baseline_passes_share"] > 0 and row["peak_memory_mib"] > 0


def test_a_step_along_normals_is_no_step_along_signs(small, monkeypatch):
    apply = ops.Table.apply

    def normals(table, do, *then):
        apply(table, dataclasses.replace(do, distribution="normal"), *then)

    monkeypatch.setattr(ops.Table, "apply", normals)
    status, found, _ = small("step", "--only", "tiny/MeZO/rademacher$")
    assert status == 1 and "at closure call 1 " in found[0]["wrong"] and found[0].get("seconds_median") is None


@pytest.mark.parametrize("case", ["MeZO", "SparseMeZO", "LeZO/in_forward", "MeZO/rademacher"])
def test_a_step_in_16_bits_is_checked_to_the_last_bit(small, monkeypatch, case):
    arguments = ["--dtype", "bf16", "--only", f"tiny/{case}$"]
    status, found, _ = small("step", *arguments)
    assert status == 0 and found[0]["correct"] is True and found[0]["dtype"] == "bfloat16"
    apply = ops.Table.apply

    def nearest(table, do, *then):
        apply(table, dataclasses.replace(do, stochastic=False), *then)

    monkeypatch.setattr(ops.Table, "apply", nearest)
    status, found, _ = small("step", *arguments)
    assert status == 1 and found[0]["wrong"] and found[0].get("seconds_median") is None


def test_steps_whose_modules_run_on_clean_weights_are_wrong(small, monkeypatch):

    apply = ops.Table.apply

    def clean(table, do, *then):
        if table.entries[0].dst is table.entries[0].src:
            return apply(table, do, *then)
        for e in table.entries:
            e.dst.copy_(e.src)

    monkeypatch.setattr(ops.Table, "apply", clean)
    status, found, _ = small("step", "--only", "MeZO/in_forward$")
    assert status == 1 and len(found) == 2
    for row in found:
        assert row["correct"] is False and "at closure call 1 " in row["wrong"]


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(4))
        self.idle = nn.Linear(2, 2)

    def forward(self, x, with_idle=True):
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean() + (self.idle(x[:, :2]).mean() if with_idle else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize(
    ("method", "options", "fault", "message"),
    [
        (zo.MeZO, {}, None, None),
        (zo.LeZO, {"drop": 0.5}, None, None),
        (zo.SparseMeZO, {"sparsity": 0.5}, None, None),
        (zo.MeZOSVRG, {"anchor_every": 3}, None, None),
        (zo.MeZO, {"directions": 3, "distribution": "rademacher"}, None, None),
        (zo.MeZOSVRG, {"anchor_every": 3, "distribution": "rademacher"}, None, None),
        (zo.FZOO, {"directions": 5}, None, None),
        (zo.SparseMeZO, {"sparsity": 0.5, "estimator": "one_sided", "normalize": "rms"}, None, None),
        (zo.FZOO, {"directions": 2}, "no D", "after the step "),
        (zo.MeZO, {"directions": 2}, "after", "after the step 1 of 630 weights"),
        (zo.MeZO, {}, "no step", "expected 2 closure calls, got 0"),
        (zo.MeZO, {}, "idle", "no module ran that owns idle.weight, idle.bias"),
        (zo.MeZO, {}, "after", "after the step 1 of 630 weights looked at are off, first in layers.1.0.weight"),
        (zo.MeZOSVRG, {"anchor_every": 3}, "after", "after the step 1 of 630 weights"),
        (zo.LeZO, {"drop": 0.5}, "other blocks", "at closure call 1 "),
        (zo.SparseMeZO, {"sparsity": 0.5}, "threshold", "of 144 weights are within the threshold"),
    ],
)
def test_one_check_sees_the_faults_of_every_method(monkeypatch, dtype, perturb, method, options, fault, message):
    torch.manual_seed(0)
    model, x = Blocks().to(dtype), torch.randn(3, 12, dtype=dtype)
    opt = method(model, lr=1e-4, perturb=perturb, **options)

    def run(closure):
        if fault != "no step":
            for _ in range(options.get("anchor_every", 1)):
                opt.step(*[closure] * (2 if method is zo.MeZOSVRG else 1))
        if fault == "after":
            model.layers[1][0].weight.data.view(-1)[7] += 0.5

    if options.get("normalize") == "rms":
        opt.step(lambda: model(x).float())  # whose v goes into the next step's D
    if fault == "no D":
        monkeypatch.setattr(Normalizer, "divided", lambda self, gradients: (gradients, self))
    if fault == "other blocks":
        drawn = exact.dropped_blocks
        monkeypatch.setattr(exact, "dropped_blocks", lambda n, drop, seed: frozenset(range(n)) - drawn(n, drop, seed))
    if fault == "threshold":
        state = opt.state_dict()
        state["zo"]["thresholds"][2] *= 1.5
        monkeypatch.setattr(opt, "state_dict", lambda: state)
    wrong = exact.wrong_step(opt, model, lambda: model(x, fault != "idle").float(), run)
    assert wrong is None if message is None else message in wrong, wrong


def test_every_method_is_stepped_in_place_and_in_the_forward(capsys):
    pytest.importorskip("transformers")
    assert main(["step", "--shape", "tiny", "--list", "--device", "cpu"]) == 0
    methods = {"MeZO", "SparseMeZO", "LeZO", "MeZOSVRG", "FZOO"}
    ends = {where + of for where in ("", "/in_forward") for of in ("", "/rademacher")}
    assert set(capsys.readouterr().out.split()) == {f"tiny/{m}{end}" for m in methods for end in ends}


def test_shapes_are_those_of_the_published_models():
    pytest.importorskip("transformers")
    sizes = {name: sum(p.numel() for p in shape.parameters()) for name, shape in SHAPES.items()}
    assert sizes["opt-125m"] == 125_239_296 and sizes["opt-1.3b"] == 1_315_758_080
    assert sizes["opt-13b"] == 12_853_473_280 and sizes["llama-7b"] == 6_738_415_616


def test_models_too_large_for_the_memory_are_skipped(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 20 * 2**30)
    assert main(["step", "--shape", "opt-1.3b", "--device", "cpu", "--list"]) == 0
    listed = dict(line.partition("  ")[::2] for line in capsys.readouterr().out.splitlines())
    assert listed["opt-1.3b/MeZO"] == ""  # two models of 4.9 GiB
    assert "of cpu memory are free" in listed["opt-1.3b/MeZOSVRG"]  # and two snapshots


def test_weights_that_are_copied_to_where_they_run(small):
    status, (row,), _ = small("offload", "--device", "cpu")
    assert status == 0 and row["correct"] is True and row["ratio"] > 0
    assert row["copied_gb_per_step"] == pytest.approx(2 * row["weights_gb"])
    assert row["weights_on_device_gb"] == row["weights_on_device_told_gb"] < row["weights_gb"]


def test_copied_weights_with_wrong_bits_have_no_time(small, wrong_passes):
    status, (row,), _ = small("offload", "--device", "cpu")
    assert status == 1 and row["wrong"] and row.get("seconds_median") is None
