"""What becomes of rows: tables, files and figures; and how a run ends."""

import json
import sys

import pytest
import torch

from benchmarks.__main__ import main, parser
from benchmarks.bench import memory, registry, report, rows, runner
from benchmarks.static import figure as roofline

STATIC = {
    "case": "triton/sm_90/bf16", "gpu": "H100", "compiler": "triton", "kernel": "in_place/none/nearest",
    "dtype": "bf16", "mask": "none", "rounding": "nearest", "bound": "bandwidth", "instructions_per_element": 30.0,
    "bytes_per_element": 4.0, "predicted_gelem_per_s": 770.0,
}  # fmt: skip
KERNEL = {
    "case": "bf16/triton/1", "device_name": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "backend": "triton",
    "elements": 2**28, "threads": None, "mask": "none", "directions": 1, "rounding": "nearest", "dropped_share": 0.0,
    "gelem_per_s": 600.0, "gb_per_s": 2400.0, "copy_gb_per_s": 2900.0, "share_of_copy": 0.83,
}  # fmt: skip
STEP = {
    "case": "tiny/MeZO", "device_name": "a processor", "baseline": "published passes", "ratio": 2.0,
    **{f"{who}{part}_seconds_median": 0.01 for who in ("", "baseline_") for part in ("forwards", "passes", "other")},
}  # fmt: skip


def written(tmp_path, *rows):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    return str(file)


def test_figures_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    file = written(tmp_path, STATIC, KERNEL, {**KERNEL, "case": "bf16/triton/2", "elements": 2**20}, STEP)
    assert main(["plot", file, "--out", str(tmp_path / "figures")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[-1].startswith("no rows in these files for") and "peers" in out[-1]
    for name in ("roofline", "bandwidth", "step"):
        pixels = imread(tmp_path / "figures" / f"{name}.png")
        assert 0.01 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.9, f"{name} is blank"


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", written(tmp_path, STATIC, STEP), "--out", str(tmp_path / "figures")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err and not (tmp_path / "figures").exists()


def test_csv_is_read_as_the_json_beside_it(tmp_path):
    found = [
        {**STATIC, "launch_dominates": None, "correct": True},
        {**KERNEL, "launch_dominates": False, "correct": True},
    ]
    beside = rows.write(found, tmp_path / "rows.json")
    assert rows.read(beside) == rows.read(tmp_path / "rows.json")


@pytest.mark.parametrize("text", ["[1, 2]", "{", '[{"a": 1}]'])
def test_files_that_hold_no_rows_are_refused(text, tmp_path, capsys):
    (tmp_path / "rows.json").write_text(text)
    assert main(["plot", str(tmp_path / "rows.json"), "--out", str(tmp_path)]) == 2
    assert "expected rows written with --json" in capsys.readouterr().err


def test_files_that_are_not_there_are_refused(tmp_path, capsys):
    assert main(["plot", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 2
    assert "expected rows written with --json" in capsys.readouterr().err


def test_a_point_is_measured_where_that_pass_was():
    (point,) = roofline.choose([STATIC])
    assert point["is_prediction"] and point["tera_instructions_per_s"] == pytest.approx(23.1)
    assert point["instructions_per_byte"] == pytest.approx(7.5)
    (point,) = roofline.choose([STATIC, KERNEL])
    assert not point["is_prediction"] and point["tera_instructions_per_s"] == pytest.approx(18.0)
    others = {
        "device_name": "NVIDIA A100-SXM4-80GB", "elements": 2**20, "dtype": "float32", "backend": "cuda",
        "mask": "bits", "rounding": "stochastic", "directions": 2, "dropped_share": 0.75, "gelem_per_s": None,
    }  # fmt: skip
    for name, value in others.items():
        (point,) = roofline.choose([STATIC, {**KERNEL, name: value}])
        assert point["is_prediction"], name
    a100 = {**KERNEL, "device_name": "NVIDIA A100-SXM4-80GB"}
    small, large = roofline.choose([{**STATIC, "gpu": gpu} for gpu in ("A100-40", "A100-80")] + [a100])
    assert small["is_prediction"] and not large["is_prediction"]


def test_a_run_prints_a_table(capsys):
    assert main(["kernels", "--elements", "64", "--rounds", "2", "--seconds", "0", "--only", "native:scalar$"]) == 0
    title, headings, first, *more = capsys.readouterr().out.splitlines()
    assert title == "benchmarks kernels" and headings.split()[:2] == ["case", "elements"]
    assert first.startswith("fp32/native:scalar") and "in-place stream" in first
    published = next(line for line in more if "published MeZO" in line)
    assert published.startswith(" ") and published.index("published MeZO") == headings.index("against")


def test_targets_and_wrong_results_are_told(capsys):
    run = {"torch_version": "1", "zo_kernels_version": "2", "commit": None, "date_utc": "3", "device_name": "chip"}
    timed = {
        "correct": True, "baseline": "other [x]", "baseline_seconds_median": 1.0, "ratio": 2.0, "ratio_p10": 1.0,
        "ratio_p90": 3.0, "ratio_of": "whole", "launch_dominates": True,
    }  # fmt: skip
    rows = [
        {"case": "good [y]", **timed, "target": "a ≥ 1; b ≤ 2", "target_missed": "b ≤ 2", **run},
        {"case": "bad", "correct": False, "wrong": "off [z]", **run},
        {"case": "other", "skipped": "no [w]", **run},
    ]
    report.show("kernels", rows, lambda row: {"ms": "1"})
    out = capsys.readouterr().out
    for text in ("good [y]", "other [x]", "a ≥ 1 met", "b ≤ 2 missed", "WRONG bad: off [z]", "skipped, no [w]: other"):
        assert text in out
    assert "take longer to launch than to run" in out


def case(name, measure=list, **options):
    return registry.Case(name, {"device": "cpu", "elements": 1, "dtype": "float32"}, measure, **options)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs made-up cases as a suite."""

    def go(*cases, **options):
        class Suite:
            cells = staticmethod(lambda row: {})

        Suite.cases = staticmethod(lambda options: list(cases))
        monkeypatch.setattr(registry, "suite", lambda name: Suite)
        file = tmp_path / "rows.json"
        given = parser().parse_args(["kernels", "--json", str(file)])
        for name, value in options.items():
            setattr(given, name, value)
        status = runner.run("kernels", given)
        return status, json.loads(file.read_text())

    return go


def test_what_does_not_fit_is_skipped_with_both_numbers(run, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * 2**30)
    ran = []
    measure = lambda: [ran.append(1) or {"skipped": "did run"}]  # noqa: E731
    status, (small, large) = run(
        case("small", measure, bytes_needed=lambda: 8 * 2**30), case("large", measure, bytes_needed=lambda: 2**34)
    )
    assert status == 0 and ran == [1] and small["skipped"] == "did run"
    assert large["skipped"] == "needs about 16.0 GiB, and 10.0 GiB of cpu memory are free"


def test_this_machine_says_how_much_memory_is_free():
    free = memory.free_bytes("cpu")
    assert free is None or free > 2**20
    assert memory.lacking("cpu", 1) is None
    assert free is None or "GiB" in memory.lacking("cpu", 2**60)


def test_cases_past_the_limit_are_skipped(run):
    _, found = run(case("a"), case("b"), limit=-1.0)
    assert [row["skipped"] for row in found] == ["the run's -1 seconds were over"] * 2


def test_out_of_memory_is_a_reason_to_skip(run):
    def measure():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    status, (row,) = run(case("a", measure))
    assert status == 0 and row["skipped"] == "out of memory: CUDA out of memory" and row["correct"] is None


def test_what_is_not_installed_is_a_reason_to_skip(run):
    def measure():
        import no_such_module.of_it  # noqa: F401

    status, (row,) = run(case("a", measure))
    assert status == 0 and row["skipped"] == "no_such_module is not installed"


def test_an_interrupted_run_keeps_what_it_has(run, tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(case("a", lambda: [{"skipped": "this one ran"}]), case("b", interrupted), case("c"))
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["skipped"] for row in found] == ["this one ran", *["the run was interrupted"] * 2]
