"""The prediction from counted machine code, against examples worked by hand; the command against the compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import main
from benchmarks.bench.registry import Unavailable
from benchmarks.static import cases as cases_static
from benchmarks.static import machine_code, triton
from benchmarks.static.bound import limits, predict, unit_of
from benchmarks.static.peaks import GPUS, Gpu
from zo_kernels.backends.tuning import DEFAULT
from zo_kernels.spec import DISTRIBUTIONS

# 10 SMs at 1 GHz: 1280 threads issued a nanosecond, 640 through a unit of 64, 160 through one of 16.
A100 = Gpu("made up", 80, 10, 1.0, 100.0, "here")
H100 = Gpu("made up", 90, 10, 1.0, 100.0, "here")


@pytest.mark.parametrize(
    ("opcode", "unit"),
    [
        ("FFMA.FTZ", "float"), ("FMUL", "float"), ("IMAD.WIDE.U32", "imad"), ("IMAD.MOV.U32", "imad"),
        ("LOP3.LUT", "alu"), ("IADD3.X", "alu"), ("FSETP.GT.AND", "alu"), ("MUFU.RSQ", "xu"), ("I2F.U32", "xu"),
        ("I2FP.F32.S32", "convert"), ("F2FP.BF16.F32.PACK_AB", "convert"), ("UIADD3", None), ("ULDC.64", None),
        ("LDG.E.128", None), ("BRA", None), ("S2R", None),
    ],
)  # fmt: skip
def test_units(opcode, unit):
    assert unit_of(opcode) == unit


def test_limits_worked_by_hand():
    # A thread makes 4 elements by 64 instructions.
    opcodes = {"FFMA": 20, "IMAD.WIDE.U32": 12, "LOP3.LUT": 16, "MUFU.RSQ": 2, "I2FP.F32.S32": 4, "UMOV": 10}
    allowed = limits(opcodes, 4, 8.0, A100)
    assert allowed == pytest.approx(
        {
            "issue": 4 * 1280 / 64,
            "fma": 4 * 640 / 32,
            "imad": 4 * 640 / 12,
            "alu": 4 * 640 / 16,
            "xu": 4 * 160 / 2,
            "convert": 4 * 640 / 4,
            "bandwidth": 0.92 * 100 / 8,
        }
    )
    assert limits(opcodes, 4, 8.0, H100)["fma"] == pytest.approx(2 * allowed["fma"])
    assert limits(opcodes, 4, 8.0, H100)["imad"] == pytest.approx(allowed["imad"])


@pytest.mark.parametrize(
    ("opcodes", "bytes_per_element", "bound", "gelem_per_s"),
    [
        ({"LOP3.LUT": 4, "FFMA": 4}, 8.0, "bandwidth", 11.5),
        ({"UMOV": 100, "LOP3.LUT": 28}, 0.01, "issue", 10.0),
        ({"FFMA": 64}, 0.01, "fma", 10.0),
        ({"MUFU.RSQ": 16}, 0.01, "xu", 10.0),
        ({"SHF.R.U32.HI": 64}, 0.01, "alu", 10.0),
    ],
)
def test_the_slowest_bounds(opcodes, bytes_per_element, bound, gelem_per_s):
    found = predict(opcodes, 1, bytes_per_element, A100)
    assert (found["bound"], found["predicted_gelem_per_s"]) == (bound, pytest.approx(gelem_per_s))
    assert found["predicted_gb_per_s"] == pytest.approx(gelem_per_s * bytes_per_element)
    assert found["predicted_share_of_copy"] == pytest.approx(found["predicted_gb_per_s"] / 92)
    assert found["compute_gelem_per_s"] >= found["predicted_gelem_per_s"] and found["compute_bound"] != "bandwidth"


def counted(**changes):
    """As a compiler's: 16 elements a thread by 320 instructions, and 3.2 times 10 once for 10 blocks."""
    fields = {
        "elements": 16,
        "first": 20.2,
        "further": 10.0,
        "outside": 0.2,
        "first_opcodes": {"FFMA": 200, "LDG.E.128": 4, "LDG.E": 2, "STG.E.128": 4, "LOP3.LUT": 109, "STL.64": 1},
        "further_opcodes": {"FFMA": 158, "STL": 2},
        "outside_opcodes": {"LDG.E.64": 8, "IMAD": 24},
        "registers": 40,
    }
    return SimpleNamespace(**{**fields, **changes})


class Compiler:
    def __init__(self, unavailable=None, error=None):
        self.reason, self.error = unavailable, error

    def unavailable(self):
        return self.reason

    def measure(self, variant):
        if self.error:
            raise Unavailable(self.error)
        return counted()


def run(tmp_path, monkeypatch, compiler, distribution="normal"):
    monkeypatch.setattr(cases_static, "COMPILERS", {"mine": compiler})
    file = tmp_path / "static.json"
    only = ["--only", "sm_80/bf16/in_place/bits", "--distribution", distribution]
    status = main(["static", *only, "--json", str(file)])
    return status, json.loads(file.read_text())


def test_rows_of_a_compiler(tmp_path, monkeypatch, capsys):
    status, (first, second) = run(tmp_path, monkeypatch, Compiler())
    assert status == 0 and (first["gpu"], second["gpu"]) == ("A100-40", "A100-80")
    assert first["compiler"] == "mine" and first["kernel"] == "in_place/bits/nearest" and first["arch"] == "sm_80"
    assert first["instructions_per_element"] == 20.2 and first["further_instructions_per_element"] == 10.0
    assert first["registers"] == 40 and first["spill_bytes"] == 8 + 2 * 4
    assert (first["load_bits"], first["store_bits"]) == (128, 128)
    assert first["bytes_per_element"] == 4.125  # read, written, and a bit
    # 200 FFMA and 3.2 * 24 / 32 IMAD in 16 elements, 64 a clock.
    rate = 108 * 1.41 * 64 / ((200 + 2.4) / 16)
    assert first["compute_bound"] == "fma" and first["compute_gelem_per_s"] == pytest.approx(rate)
    assert first["bound"] == "bandwidth" and first["predicted_gb_per_s"] == pytest.approx(0.92 * 1555)
    assert first["predicted_share_of_copy"] == pytest.approx(1) and first["is_prediction"] is True
    assert "whitepaper" in first["source"] and "Programming Guide" in first["source"]
    assert "Predictions, not measurements" in capsys.readouterr().out
    assert first["distribution"] == "normal"


def test_rows_of_signs(tmp_path, monkeypatch):
    _, rows = run(tmp_path, monkeypatch, Compiler(), "rademacher")
    assert {row["kernel"] for row in rows} == {"in_place/bits/nearest/rademacher"}
    assert {row["distribution"] for row in rows} == {"rademacher"}


@pytest.mark.parametrize("compiler", [Compiler(unavailable="no nvcc"), Compiler(error="no nvcc")])
def test_a_compiler_that_is_missing_is_skipped_with_its_reason(tmp_path, monkeypatch, compiler, capsys):
    status, (row,) = run(tmp_path, monkeypatch, compiler)
    assert status == 0 and row["skipped"] == "no nvcc" and row.get("bound") is None
    assert "skipped, no nvcc: mine/sm_80/bf16/in_place/bits/nearest" in capsys.readouterr().out


def test_stochastic_rounding_is_for_16_bits(monkeypatch):
    monkeypatch.setattr(cases_static, "COMPILERS", {"mine": Compiler()})
    names = {case.name for case in cases_static.cases(SimpleNamespace(arch=[90], distribution=DISTRIBUTIONS))}
    assert "mine/sm_90/bf16/in_place/threshold/stochastic" in names
    assert "mine/sm_90/bf16/in_place/threshold/stochastic/rademacher" in names
    assert not any("fp32" in name and "stochastic" in name for name in names)


def test_the_interpreter_is_no_compiler(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in triton.unavailable()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton.unavailable() is None


def test_peaks_say_where_they_are_from():
    for gpu in GPUS:
        assert gpu.source and gpu.gb_per_s > 1000


def test_triton_s_own_kernel(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path / "static.json"
    only = "^triton/sm_90/bf16/in_place/none/nearest$"
    command = [sys.executable, "-m", "benchmarks", "static", "--only", only, "--json", str(file)]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    (row,) = json.loads(file.read_text())
    assert row["gpu"] == "H100" and 20 < row["instructions_per_element"] < 60 and row["spill_bytes"] == 0
    assert (row["load_bits"], row["store_bits"], row["bytes_per_element"]) == (128, 128, 4)
    assert row["predicted_gelem_per_s"] <= 0.92 * 3350 / 4 + 1e-6


SASS = """
\t.section\t.text.a_kernel,"ax",@progbits
        /*0000*/                   S2R R0, SR_CTAID.X ;
.L_x_0:
        /*0010*/                   LDG.E R1, [R2.64] ;
        /*0020*/              @P0  BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDG.E.128 R4, [R2.64] ;
        /*0040*/              @!P1 BRA `(.L_x_3) ;
        /*0050*/                   MOV R8, R9 ;
.L_x_2:
        /*0060*/                   FFMA R4, R4, R5, R6 ;
        /*0070*/              @P2  BRA `(.L_x_2) ;
.L_x_3:
        /*0080*/                   STG.E.128 [R2.64], R4 ;
        /*0090*/              @P3  BRA `(.L_x_1) ;
.L_x_4:
        /*00a0*/                   STG.E [R2.64], R4 ;
        /*00b0*/              @P4  BRA `(.L_x_4) ;
        /*00c0*/                   EXIT ;
.L_x_5:
        /*00d0*/                   BRA `(.L_x_5);
        /*00e0*/                   NOP;
"""


def test_instructions_counted_by_hand():
    ((name, code),) = machine_code.kernels(SASS).items()
    static = machine_code.counted(machine_code.Kernel(*code), 4)
    assert name == "a_kernel"
    # The MOV is run only if there are further directions, the narrow stores only for ragged blocks.
    assert static.first_opcodes == {"LDG.E.128": 1, "BRA": 2, "STG.E.128": 1}
    assert static.further_opcodes == {"FFMA": 1, "BRA": 1}
    steps = machine_code.SEARCH_STEPS
    assert static.outside_opcodes == {"S2R": 1, "EXIT": 1, "BRA": 1 + steps, "LDG.E": steps}
    assert static.outside == (3 + 2 * steps) / (4 * DEFAULT.most_blocks)
    assert (static.first, static.further) == (4 / 4 + static.outside, 2 / 4)


# The loop over directions holds another one: over each of a group, or over those that do not fill a group.
GROUPS = SASS.replace(
    """        /*0060*/                   FFMA R4, R4, R5, R6 ;
""",
    """        /*0061*/                   IMAD R4, R4, R5, R6 ;
        /*0062*/              @P5  BRA `(.L_x_7) ;
.L_x_6:
        /*0063*/                   FSEL R4, R4, R5, R6 ;
        /*0064*/                   FADD R4, R4, R5 ;
        /*0065*/              @P5  BRA `(.L_x_6) ;
        /*0066*/                   BRA `(.L_x_8) ;
.L_x_7:
FULL.L_x_8:
        /*0069*/                   MOV R4, R4 ;
        /*006a*/              @P6  BRA `(.L_x_3) ;
        /*006b*/                   LOP3.LUT R4, R4 ;
""",
).replace("@P2  BRA", "BRA")


def test_groups_of_directions_counted_by_hand():
    ((_, code),) = machine_code.kernels(GROUPS.replace("FULL", "")).items()
    static = machine_code.counted(machine_code.Kernel(*code), 1)
    assert static.first_opcodes == {"LDG.E.128": 1, "BRA": 2, "STG.E.128": 1}
    each, around = {"FSEL": 8, "FADD": 8}, {"IMAD": 1, "MOV": 1, "LOP3.LUT": 1}
    assert static.further_opcodes == {**each, **around, "BRA": 8 + 4}
    assert static.further == sum(static.further_opcodes.values()) / 8

    full = "        /*0068*/                   FADD R4, R4, R5 ;\n" * 8
    ((_, code),) = machine_code.kernels(GROUPS.replace("FULL", full)).items()
    static = machine_code.counted(machine_code.Kernel(*code), 1)
    once = {"IMAD": 1, "FSEL": 1, "FADD": 1, "MOV": 2}
    assert static.first_opcodes == {**once, "LDG.E.128": 1, "BRA": 6, "STG.E.128": 1}
    assert static.further_opcodes == {**around, "FADD": 8, "BRA": 4}
    assert static.further == 15 / 8


def test_other_kernels_are_not_counted():
    (code,) = machine_code.kernels(SASS.replace("@P2  BRA", "@P2  MOV")).values()
    with pytest.raises(Unavailable, match="expected loops"):
        machine_code.counted(machine_code.Kernel(*code), 4)
