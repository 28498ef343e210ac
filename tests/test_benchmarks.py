"""The benchmarks at sizes at which their times mean nothing: what they check, what they write, and what they refuse."""

import csv
import json

import pytest
import torch
from torch import nn

pytest.importorskip("rich")

from benchmarks import cases_kernels, registry, rows
from benchmarks.__main__ import main, parser
from benchmarks.baseline_steps import Baseline
from benchmarks.baselines import EagerPass, published_pass
from benchmarks.kernel_call import KernelCall, Kind, weights
from benchmarks.registry import Target
from benchmarks.timing import Call, Plan, Timer, Watch, alternate, quantile
from zo_kernels import ops
from zo_kernels.backends.native import instruction_sets

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

    def off(table, do):
        apply(table, do)
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
        assert row["gelem_per_s"] == pytest.approx(4096 / row["seconds_median"] / 1e9)
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
        call.entry.dst[-1] += 1.0

    call._apply = off
    assert f"{elements - 1} are not the reference's" in call.check()


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
    arguments = ["step", "--shape", "tiny", "--threads", "1"]
    status, found, table = rows_of(tmp_path, *arguments)
    assert status == 0 and len(table) == len(found)
    assert {row["case"] for row in found} == {"tiny/MeZO", "tiny/SparseMeZO", "tiny/LeZO", "tiny/MeZOSVRG"}
    for row in found:
        assert row["correct"] is True and not any(isinstance(value, (dict, list)) for value in row.values())
        parts = [row[f"{part}_share"] for part in ("forwards", "passes", "other")]
        assert all(0 < share < 1 for share in parts)
        assert row["extra_memory_mib"] <= row["elements"] * 4 / 2**20 + 1
        assert (row["active_share"] < 1) == (row["method"] == "LeZO")
        assert row["ratio"] > 0 and row["ratio_of"] == ("passes" if row["baseline"] == "MeZO" else "whole")
    assert {row["baseline"] for row in found} == {"published passes", "eager passes", "MeZO"}


def test_a_wrong_step_has_no_time_and_the_run_fails(tmp_path, wrong_passes):
    pytest.importorskip("transformers")
    status, found, _ = rows_of(tmp_path, "step", "--shape", "tiny", "--threads", "1", "--only", "tiny/MeZO$")
    assert status == 1
    assert found[0]["correct"] is False and "at closure call 1 1 of" in found[0]["wrong"]
    assert found[0]["seconds_median"] is None and found[0]["ratio"] is None


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
