"""The benchmarks at sizes at which their times mean nothing: what they check, what they write, and what they refuse."""

import copy
import csv
import dataclasses
import json
import time

import pytest
import torch
from torch import nn

pytest.importorskip("rich")

from tiny_run import tiny_encoder, write_table

import zo_kernels as zo
from benchmarks.__main__ import main, parser
from benchmarks.bench import registry, room, rows
from benchmarks.bench.registry import Target
from benchmarks.bench.timing import Call, Plan, Timer, Watch, alternate, quantile
from benchmarks.exactness.upcast import upcast
from benchmarks.gpu import headlines
from benchmarks.gpu.tables import TABLES
from benchmarks.kernels import cases as cases_kernels
from benchmarks.kernels.baselines import EagerPass, published_pass
from benchmarks.kernels.kernel_call import KernelCall, Kind, weights
from benchmarks.step.baseline_steps import Baseline
from benchmarks.step.shapes import SHAPES
from zo_kernels import ops
from zo_kernels.backends.native import instruction_sets
from zo_kernels.runs import recorded

CPU = torch.device("cpu")
QUICK = ["--rounds", "2", "--seconds", "0"]


def rows_of(tmp_path, *arguments):
    file = tmp_path / "rows.json"
    status = main([*arguments, *QUICK, "--json", str(file)])
    return status, json.loads(file.read_text()), list(csv.DictReader(file.with_suffix(".csv").open()))


@pytest.fixture
def wrong_passes(monkeypatch):
    """Every pass also moves the first weight by a little."""
    apply = ops.Table.apply

    def off(table, do, *then):
        apply(table, do, *then)
        table.entries[0].dst.view(-1)[0] += 1e-3

    monkeypatch.setattr(ops.Table, "apply", off)


def test_kernels_rows_are_flat_and_carry_their_units(tmp_path):
    status, found, table = rows_of(tmp_path, "kernels", "--elements", "4096", "--only", "fp32")
    assert status == 0
    assert len(found) == len(table)
    for row in found:
        assert list(row)[: len(rows.COLUMNS)] == list(rows.COLUMNS) == list(table[0])[: len(rows.COLUMNS)]
        assert not any(isinstance(value, (dict, list)) for value in row.values())
        assert row["dtype"] == "float32"
        assert row["date_utc"] and row["torch_version"] == torch.__version__ and row["device"] in ("cpu", "cuda")
    ran = [row for row in found if row["skipped"] is None]
    assert {row["mask"] for row in ran} == {"none", "threshold", "bool", "bits", "record"}
    for row in ran:
        assert row["correct"] is True and row["wrong"] is None
        assert 0 < row["seconds_p10"] <= row["seconds_median"] <= row["seconds_p90"]
        assert row["gelem_per_s"] == pytest.approx(4096 * (1 - row["dropped_share"]) / row["seconds_median"] / 1e9)
        assert row["gb_per_s"] > 0 and row["share_of_copy"] > 0
        assert row["ratio_p10"] <= row["ratio"] <= row["ratio_p90"] and row["baseline_seconds_median"] > 0
        assert row["target"] is None  # it is stated for large tensors alone


def test_skipped_cases_have_reasons_and_no_times(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, found, _ = rows_of(tmp_path, "kernels", "--elements", "64", "--only", "^bf16/triton")
    assert status == 0 and found
    for row in found:
        assert row["skipped"] == "PyTorch sees no GPU here"
        assert row["correct"] is None and row["seconds_median"] is None and row["ratio"] is None
    assert "PyTorch sees no GPU here: bf16/triton" in capsys.readouterr().out


def test_the_reason_for_a_missing_instruction_set_is_the_backends(monkeypatch):
    monkeypatch.setattr("zo_kernels.backends.native.instruction_sets", lambda: ["scalar"])
    cases = cases_kernels.cases(parser().parse_args(["kernels", "--elements", "64"]))
    reasons = {case.skipped for case in cases if case.facts["backend"] == "native:avx512"}
    assert reasons == {"this processor has no avx512, only scalar"}


def test_a_wrong_result_has_no_time_and_the_run_fails(tmp_path, wrong_passes, capsys):
    status, found, _ = rows_of(tmp_path, "kernels", "--elements", "4096", "--only", "^bf16/native:scalar$")
    assert status == 1
    (row,) = found
    assert row["correct"] is False and "not the reference's" in row["wrong"]
    assert row["seconds_median"] is None and row["ratio"] is None and row["baseline"] is None
    assert "WRONG bf16/native:scalar" in capsys.readouterr().out


def test_a_case_that_raises_is_wrong_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(cases_kernels, "_eager", broken)
    status, found, _ = rows_of(tmp_path, "kernels", "--elements", "64", "--only", "^fp32/native:scalar$")
    assert status == 1 and found[0]["wrong"] == "RuntimeError: no memory" and found[0]["correct"] is False


@pytest.mark.parametrize("elements", [1, 4097, 20001])
@pytest.mark.parametrize("mask", ["none", "threshold", "bool", "bits", "record"])
def test_check_sees_one_wrong_element(elements, mask):
    w = weights(elements, torch.bfloat16, CPU)
    call = KernelCall(w, Kind(mask, 2, "stochastic"), f"native:{instruction_sets()[0]}")
    assert call.check() is None
    apply = call._apply

    def off(do):
        apply(do)
        call.entries[-1].dst[-1] += 1.0

    call._apply = off
    assert f"{elements - 1} are not the reference's" in call.check()


@pytest.mark.parametrize("piece", [0, 1, 7, 12, 15])
def test_check_sees_a_dropped_block_that_is_visited(piece):
    w = weights(4096, torch.float32, CPU)
    call = KernelCall(w, Kind(dropped=0.75), f"native:{instruction_sets()[0]}")
    assert call.check() is None and call.elements == 1024 and call.bytes_moved == 8192
    apply = call._apply

    def off(do):
        apply(do)
        call.entries[piece].dst[0] += 1.0

    call._apply = off
    assert "are not the reference's" in call.check()


def test_targets_are_stated_and_judged():
    row = {"ratio": 5.0}
    assert registry.judge(row, []) == {"target": None, "target_met": None, "target_missed": None}
    assert registry.judge(row, [Target("ratio", 4.0)]) == {
        "target": "ratio ≥ 4",
        "target_met": True,
        "target_missed": None,
    }
    two = registry.judge(row, [Target("ratio", 4.0), Target("ratio", at_most=4.5)])
    assert two["target_met"] is False and two["target_missed"] == "ratio ≤ 4.5"
    assert registry.verdicts(two) == [("ratio ≥ 4", True), ("ratio ≤ 4.5", False)]


def test_pairs_alternate_and_leave_the_thread_count():
    order, before = [], torch.get_num_threads()
    ours, other = Call(lambda: order.append("ours")), Call(lambda: order.append("other"))
    pairs = alternate(ours, {"other": other}, Timer(CPU), Plan(rounds=3, seconds=0.0))
    assert order == ["ours", "other", "ours", "other", "other", "ours", "ours", "other"]
    order.clear()
    alternate(ours, {"other": other}, Timer(CPU), Plan(rounds=2, seconds=0.0, second=True))
    assert order == ["ours", "other", *["ours"] * 2, *["other"] * 4, *["ours"] * 2]
    assert len(pairs["other"]) == 3 and torch.get_num_threads() == before
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0 and quantile([0.0, 1.0], 0.1) == pytest.approx(0.1)


def test_parts_of_a_call_sum_to_the_whole():
    watch = Watch(CPU)

    def run():
        for _ in range(2):
            with watch.part("passes"):
                sum(range(1000))

    sample = Timer(CPU).sample(Call(run, watch=watch, steps=2))
    assert set(sample.parts) == {"passes", "other"}
    assert sum(sample.parts.values()) == pytest.approx(sample.seconds)


def test_a_part_within_another_is_counted_once():
    watch = Watch(CPU)

    def run():
        with watch.part("forwards"):
            time.sleep(1e-3)
            with watch.part("passes"):
                time.sleep(3e-3)

    sample = Timer(CPU).sample(Call(run, watch=watch))
    assert sample.parts["passes"] >= 3e-3 and 0 < sample.parts["forwards"] <= sample.seconds - 3e-3
    assert sum(sample.parts.values()) == pytest.approx(sample.seconds)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize(("svrg", "masked"), [(True, False), (False, True), (False, False)])
def test_baseline_steps_probe_restore_and_descend(published, svrg, masked):
    torch.manual_seed(3)
    params = [nn.Parameter(torch.randn(40, 5)), nn.Parameter(torch.randn(60))]
    clean = [p.detach().clone() for p in params]
    thresholds = [0.5, 0.5] if masked else [None, None]

    def loss():
        return sum((p**2).sum() for p in params)

    def step(lr):
        passes = published_pass if published else EagerPass(params)
        steps = Baseline(params, passes, not published, loss, Watch(CPU), eps=1e-3, lr=lr, thresholds=thresholds)
        return steps.svrg(3) if svrg else steps.spsa()

    step(lr=0.0)
    for p, before in zip(params, clean, strict=True):
        torch.testing.assert_close(p.data, before, rtol=0.0, atol=3e-6)
    before = loss().item()
    for _ in range(30):
        step(lr=1e-3)
    assert loss().item() < before - 1e-3
    if masked:
        for p, start in zip(params, clean, strict=True):
            torch.testing.assert_close(p.data[start.abs() > 0.6], start[start.abs() > 0.6], rtol=0.0, atol=3e-6)


def test_steps_of_a_tiny_model(tmp_path):
    pytest.importorskip("transformers")
    some = ("MeZO", "LeZO", "MeZOSVRG", "SparseMeZO/in_forward", "MeZOSVRG/in_forward")
    only = f"tiny/({'|'.join(some)})$"
    status, found, table = rows_of(tmp_path, "step", "--shape", "tiny", "--threads", "1", "--only", only)
    assert status == 0 and len(table) == len(found)
    assert {row["case"] for row in found} == {f"tiny/{name}" for name in some}
    for row in found:
        assert row["correct"] is True and not any(isinstance(value, (dict, list)) for value in row.values())
        parts = [row[f"{part}_share"] for part in ("forwards", "passes", "other")]
        assert all(0 < share < 1 for share in parts)
        assert row["extra_memory_mib"] <= row["elements"] * 4 / 2**20 + 1
        assert (row["active_share"] < 1) == (row["method"] == "LeZO")
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
    assert len(headlines.of("step", found)) == len(some) and len(TABLES["gpu-steps"](found)[1]) == len(found)


@pytest.mark.parametrize("case", ["MeZO", "MeZO/in_forward", "LeZO", "LeZO/in_forward"])
def test_no_timed_step_pays_for_another_s_weights(tmp_path, monkeypatch, case):
    """An optimizer whose weights somebody else has changed takes fingerprints: each that is timed has its own."""
    pytest.importorskip("transformers")
    taken, fingerprints = [], recorded.weight_setups
    monkeypatch.setattr(recorded, "weight_setups", lambda *a: taken.append(1) or fingerprints(*a))
    status, _, _ = rows_of(tmp_path, "step", "--shape", "tiny", "--threads", "1", "--only", f"tiny/{case}$")
    assert status == 0 and len(taken) <= 8  # of each optimizer when it begins, of copies that measure memory, too


def test_weights_that_are_copied_to_where_they_run(tmp_path):
    pytest.importorskip("transformers")
    status, (row,), _ = rows_of(tmp_path, "offload", "--shape", "tiny", "--threads", "1", "--device", "cpu")
    assert status == 0 and row["correct"] is True and row["ratio"] > 0
    assert row["copied_gb_per_step"] == pytest.approx(2 * row["weights_gb"])
    assert row["weights_on_device_gb"] == row["weights_on_device_told_gb"] < row["weights_gb"]
    assert headlines.of("offload", [row])[0].startswith("tiny: ") and len(TABLES["gpu-offload"]([row])[1]) == 1


def test_copied_weights_with_wrong_bits_have_no_time(tmp_path, wrong_passes):
    pytest.importorskip("transformers")
    status, (row,), _ = rows_of(tmp_path, "offload", "--shape", "tiny", "--threads", "1", "--device", "cpu")
    assert status == 1 and row["wrong"] and row["seconds_median"] is None


@pytest.mark.parametrize("case", ["MeZO", "MeZO/in_forward", "LeZO/in_forward", "MeZOSVRG/in_forward"])
def test_a_wrong_step_has_no_time_and_the_run_fails(tmp_path, wrong_passes, case):
    pytest.importorskip("transformers")
    status, found, _ = rows_of(tmp_path, "step", "--shape", "tiny", "--threads", "1", "--only", f"tiny/{case}$")
    assert status == 1
    assert found[0]["correct"] is False and "at closure call 1 " in found[0]["wrong"]
    assert found[0]["seconds_median"] is None and found[0]["ratio"] is None


@pytest.mark.parametrize("case", ["MeZO", "SparseMeZO", "LeZO/in_forward"])
def test_a_step_in_16_bits_is_checked_to_the_last_bit(tmp_path, monkeypatch, case):
    pytest.importorskip("transformers")
    arguments = ["step", "--shape", "tiny", "--threads", "1", "--dtype", "bf16", "--only", f"tiny/{case}$"]
    status, found, _ = rows_of(tmp_path, *arguments)
    assert status == 0 and found[0]["correct"] is True and found[0]["dtype"] == "bfloat16"
    apply = ops.Table.apply

    def nearest(table, do, *then):
        apply(table, dataclasses.replace(do, stochastic=False), *then)

    monkeypatch.setattr(ops.Table, "apply", nearest)
    status, found, _ = rows_of(tmp_path, *arguments)
    assert status == 1 and found[0]["wrong"] and found[0]["seconds_median"] is None


def test_shapes_are_those_of_the_published_models():
    pytest.importorskip("transformers")
    sizes = {name: sum(p.numel() for p in shape.parameters()) for name, shape in SHAPES.items()}
    assert sizes["opt-125m"] == 125_239_296 and sizes["opt-1.3b"] == 1_315_758_080
    assert sizes["opt-13b"] == 12_853_473_280 and sizes["llama-7b"] == 6_738_415_616


def test_models_too_large_for_the_memory_are_skipped(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(room, "free_bytes", lambda device: 20 * 2**30)
    assert main(["step", "--shape", "opt-1.3b", "--device", "cpu", "--list"]) == 0
    listed = dict(line.partition("  ")[::2] for line in capsys.readouterr().out.splitlines())
    assert listed["opt-1.3b/MeZO"] == ""  # two models of 4.9 GiB
    assert "of cpu memory are free" in listed["opt-1.3b/MeZOSVRG"]  # and two snapshots


def test_kernels_too_large_for_the_memory_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 2**30)
    status, found, _ = rows_of(tmp_path, "kernels", "--elements", "2G", "--only", "^fp32/native:avx2/2|avx2$")
    assert (
        status == 0 and found and all("needs about" in row["skipped"] or "no avx2" in row["skipped"] for row in found)
    )


def test_steps_whose_modules_run_on_clean_weights_are_wrong(tmp_path, monkeypatch):
    pytest.importorskip("transformers")

    apply = ops.Table.apply

    def clean(table, do, *then):
        if table.entries[0].dst is table.entries[0].src:
            return apply(table, do, *then)
        for e in table.entries:
            e.dst.copy_(e.src)

    monkeypatch.setattr(ops.Table, "apply", clean)
    status, found, _ = rows_of(tmp_path, "step", "--shape", "tiny", "--threads", "1", "--only", "MeZO/in_forward")
    assert status == 1 and len(found) == 2
    for row in found:
        assert row["correct"] is False and "at closure call 1 " in row["wrong"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny encoder; its task has a few dozen texts."""
    pytest.importorskip("transformers")
    from benchmarks.exactness import demo_task
    from zo_kernels.finetune.data.splits import read_table, split

    folder = tmp_path_factory.mktemp("tiny")
    texts = read_table(write_table(folder / "texts.tsv"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            demo_task, "_docstrings", lambda seed: split(texts, seed=seed, held_out=dict.fromkeys(texts, (5, 5)))
        )
        yield str(tiny_encoder(folder))


def exactness(tmp_path, tiny, only, *arguments):
    given = ["--model", tiny, "--threads", "1", "--steps", "40", "--run-steps", "3", "--seeds", "0", "1", *arguments]
    return rows_of(tmp_path, "exactness", "--only", only, *given)


def test_drift_in_place_and_none_in_the_forward(tmp_path, tiny):
    status, found, _ = exactness(tmp_path, tiny, "^drift")
    assert status == 0 and len(found) == 10 * 2 and {row["steps"] for row in found} == {1, 40}
    for row in found:
        assert row["correct"] is True and row["seconds_median"] is None and row["elements"] == 16 * 32
        drifted = row["perturb"] == "in_place"
        assert (row["share_changed"] > 0.2) == drifted == (row["relative_rms"] > 0) == (row["largest"] > 0)
        assert row["relative_rms"] < (1e-6 if row["dtype"] == "fp32" else 0.1)


def test_small_updates_survive_stochastic_rounding(tmp_path, tiny):
    status, found, _ = exactness(tmp_path, tiny, "^survival", "--draws", "16")
    assert status == 0 and len(found) == 2 * 2 * 5
    for row in found:
        if row["update"] == 1e-7:
            lost = row["rounding"] == "nearest"
            assert (row["left"] < 0.3) == lost
            assert lost or abs(row["left"] - 1) < 5 * row["left_standard_error"]


def test_four_ways_to_run_in_16_bits(tmp_path, tiny):
    status, found, _ = exactness(tmp_path, tiny, "^four/bf16/in_forward")
    assert status == 0 and len(found) == 2 * 3
    assert [row["run_seed"] for row in found[:3]] == [0, 1, None]
    for first, second, mean in zip(found[::3], found[1::3], found[2::3], strict=True):
        assert mean["dev_loss"] == pytest.approx((first["dev_loss"] + second["dev_loss"]) / 2)
        assert mean["runs"] == 2 and mean["dev_loss_sd"] > 0 and 0 <= mean["test_accuracy"] <= 1


def test_replay_is_timed_and_measured(tmp_path, tiny):
    status, found, _ = exactness(tmp_path, tiny, "^replay")
    assert status == 0 and len(found) == 4
    for row in found:
        assert row["steps"] == 40 and row["real_steps"] == 24 and row["bytes_a_step"] == 24
        assert row["file_bytes"] > 40 * 24 and row["baseline"] == "training" and row["ratio"] > 0
        assert row["replay_seconds"] == pytest.approx(40 * row["seconds_median"])


def test_what_sharing_z_could_save(tmp_path, tiny):
    status, found, _ = exactness(tmp_path, tiny, "^shared-z")
    assert status == 0 and len(found) == 4
    for copied, step in zip(found[::2], found[1::2], strict=True):
        assert copied["baseline"] == "copy_" and copied["saved_share_at_most"] is None
        assert 0 <= step["saved_share_at_most"] < 1
        assert step["price_mib"] == pytest.approx(step["elements"] * (4 if step["dtype"] == "fp32" else 2) / 2**20)


@pytest.mark.parametrize(
    "case",
    [
        "drift/fp32/in_place/nearest",
        "drift/bf16/in_forward/stochastic",
        "survival/fp16/nearest",
        "four/bf16/in_place/stochastic",
        "replay/fp32/mezo/in_place",
        "replay/fp32/lezo/in_place",
        "replay/bf16/mezo/in_forward",
        "shared-z/bf16",
    ],
)
def test_wrong_passes_have_no_figures(tmp_path, tiny, wrong_passes, case):
    status, found, _ = exactness(tmp_path, tiny, f"^{case}$")
    (row,) = found
    assert status == 1 and row["correct"] is False and row["wrong"]
    figures = ("seconds_median", "share_changed", "left", "dev_loss", "replay_seconds", "saved_share_at_most")
    assert not any(row.get(name) is not None for name in figures)


def test_replay_of_another_run_is_wrong(tmp_path, tiny, monkeypatch):
    replay = zo.replay

    def off(module, *arguments):
        replay(module, *arguments)
        with torch.no_grad():
            next(module.parameters()).view(-1)[0] += 1.0

    monkeypatch.setattr(zo, "replay", off)
    status, found, _ = exactness(tmp_path, tiny, "^replay/fp32/mezo/in_forward")
    assert status == 1 and found[0]["wrong"].startswith("1 of the weights replayed with 1 threads")


def test_widened_weights_are_read_when_the_module_runs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2, bias=False))
    model.to(torch.bfloat16)
    wide, ids = copy.deepcopy(model).float(), torch.tensor([0, 3])
    upcast(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.equal(model(ids), wide(ids)) and torch.equal(copy.deepcopy(model)(ids), wide(ids))
    with torch.no_grad():
        for p in (*model.parameters(), *wide.parameters()):
            p.data = p.data * 2
    assert torch.equal(model(ids), wide(ids))


def test_every_method_is_stepped_in_place_and_in_the_forward(capsys):
    pytest.importorskip("transformers")
    assert main(["step", "--shape", "tiny", "--list", "--device", "cpu"]) == 0
    methods = {"MeZO", "SparseMeZO", "LeZO", "MeZOSVRG"}
    assert set(capsys.readouterr().out.split()) == {f"tiny/{m}{end}" for m in methods for end in ("", "/in_forward")}


def test_list_names_cases_and_measures_nothing(capsys):
    assert main(["kernels", "--list", "--only", "fp32/native:scalar"]) == 0
    assert capsys.readouterr().out.split() == ["fp32/native:scalar"]


def test_bad_options_are_refused(capsys):
    assert main(["kernels", "--only", "no such case"]) == 2
    for arguments in (["kernels", "--elements", "0"], ["kernels", "--elements", "1.5M"], ["kernels", "--only", "("]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    assert parser().parse_args(["kernels", "--elements", "64M", "1K"]).elements == [64 * 2**20, 1024]
