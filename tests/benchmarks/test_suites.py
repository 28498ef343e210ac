"""The benchmarks at sizes at which their times mean nothing: what they check, what they write, and what they refuse."""

import dataclasses
import time

import pytest
import torch

pytest.importorskip("rich")


from benchmarks.__main__ import main, parser
from benchmarks.bench import memory, registry, rows
from benchmarks.bench.registry import Target
from benchmarks.bench.timing import Call, Plan, Timer, Watch, alternate, quantile
from benchmarks.kernels import cases as cases_kernels
from benchmarks.kernels.check import wrong_pass
from benchmarks.kernels.kernel_call import KernelCall, Kind, weights
from zo_kernels.backends.native import instruction_sets

CPU = torch.device("cpu")


def test_kernels_rows_are_flat_and_carry_their_units(rows_of):
    status, found, table = rows_of("kernels", "--elements", "4096", "--only", "fp32")
    assert status == 0
    assert len(found) == len(table)
    for row in found:
        assert [c for c in row if c in rows.COLUMNS] == list(rows.COLUMNS) == list(table[0])[: len(rows.COLUMNS)]
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


def test_signs_are_timed_beside_a_stream_and_normals(rows_of):
    fastest = instruction_sets()[0]
    status, found, _ = rows_of("kernels", "--elements", "4096", "--only", f"^bf16/native:{fastest}/.*rademacher")
    assert status == 0 and all(row["distribution"] == "rademacher" and row["correct"] is True for row in found)
    baselines: dict[str, set[str]] = {}
    for row in found:
        baselines.setdefault(row["case"].split(":")[1].partition("/")[2], set()).add(row["baseline"])
    every = {"in-place stream", "normals"}
    assert baselines["distribution=rademacher"] == every | {"eager", "published MeZO with randint"}
    assert baselines["directions=64/distribution=rademacher"] == every
    assert baselines["mask=bits/distribution=rademacher"] == every | {"unmasked"}
    assert baselines["rounding=stochastic/distribution=rademacher"] == every | {"nearest"}
    assert len(baselines) == 14 - (len(baselines) == 13)  # with two threads, where there are as many processors


@pytest.mark.parametrize(
    ("timed", "expected"),
    [
        (("fp32", 2**26, {}), {"in-place stream": 0.9, "normals": 2.0}),
        (("bf16", 2**26, {}), {"in-place stream": 0.75, "normals": 1.8}),
        (("bf16", 2**20, {}), {"normals": 5.0}),
        (("fp32", 2**26, {"mask": "bits"}), {"unmasked": 1 / 1.15}),
        (("fp32", 2**26, {"directions": 64}), {"normals": 12.0}),
        (("fp32", 2**23, {}), {}),
    ],
)
def test_targets_of_signs_are_those_of_avx2_on_one_thread(timed, expected):
    dtype, elements, changed = timed
    kind = dataclasses.replace(cases_kernels.SIGNS, **changed)
    stated = cases_kernels.Timed("", dtype, "native:avx2", elements, kind)
    assert cases_kernels._bounds_of_signs(stated) == expected
    for other in (dataclasses.replace(stated, threads=2), dataclasses.replace(stated, backend="native:avx512")):
        assert cases_kernels._bounds_of_signs(other) == {}


def test_normals_are_no_signs():
    call = KernelCall(weights(4096, torch.float32, CPU), Kind(distribution="rademacher"), "native")
    call._passes = [dataclasses.replace(do, distribution="normal") for do in call._passes]
    signs = [dataclasses.replace(do, distribution="rademacher") for do in call._passes]
    assert wrong_pass(call.entries, signs[0], call.run) is not None


def test_skipped_cases_have_reasons_and_no_times(rows_of, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, found, _ = rows_of("kernels", "--elements", "64", "--only", "^bf16/triton")
    assert status == 0 and found
    for row in found:
        assert row["skipped"] == "PyTorch sees no GPU here"
        assert row["correct"] is None and row.get("seconds_median") is None and row.get("ratio") is None
    assert "PyTorch sees no GPU here: bf16/triton" in capsys.readouterr().out


def test_the_reason_for_a_missing_instruction_set_is_the_backends(monkeypatch):
    monkeypatch.setattr("zo_kernels.backends.native.instruction_sets", lambda: ["scalar"])
    cases = cases_kernels.cases(parser().parse_args(["kernels", "--elements", "64"]))
    reasons = {case.skipped for case in cases if case.facts["backend"] == "native:avx512"}
    assert reasons == {"this processor has no avx512, only scalar"}


def test_a_wrong_result_has_no_time_and_the_run_fails(rows_of, wrong_passes, capsys):
    status, found, _ = rows_of("kernels", "--elements", "4096", "--only", "^bf16/native:scalar$")
    assert status == 1
    (row,) = found
    assert row["correct"] is False and "not the reference's" in row["wrong"]
    assert row.get("seconds_median") is None and row.get("ratio") is None and row.get("baseline") is None
    assert "WRONG bf16/native:scalar" in capsys.readouterr().out


def test_a_case_that_raises_is_wrong_and_the_others_go_on(rows_of, monkeypatch):
    def broken(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(cases_kernels, "_eager", broken)
    status, found, _ = rows_of("kernels", "--elements", "64", "--only", "^fp32/native:scalar$")
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


def test_check_sees_a_wrong_bit_of_a_recorded_mask():
    call = KernelCall(weights(20001, torch.float32, CPU), Kind("record"), f"native:{instruction_sets()[0]}")
    apply = call._apply

    def off(do):
        apply(do)
        call.entries[0].mask_tensor[-1] ^= 1

    call._apply = off
    assert call.check() == "1 bytes of the mask of elements 15904 to 20000 are not the reference's"


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


def test_kernels_too_large_for_the_memory_are_skipped(rows_of, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    status, found, _ = rows_of("kernels", "--elements", "2G", "--only", "^fp32/native:avx2/2|avx2$")
    assert (
        status == 0 and found and all("needs about" in row["skipped"] or "no avx2" in row["skipped"] for row in found)
    )


def test_list_names_cases_and_measures_nothing(capsys):
    assert main(["kernels", "--list", "--only", "fp32/native:scalar$"]) == 0
    assert capsys.readouterr().out.split() == ["fp32/native:scalar"]


def test_bad_options_are_refused(capsys):
    assert main(["kernels", "--only", "no such case"]) == 2
    for arguments in (["kernels", "--elements", "0"], ["kernels", "--elements", "1.5M"], ["kernels", "--only", "("]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    assert parser().parse_args(["kernels", "--elements", "64M", "1K"]).elements == [64 * 2**20, 1024]
