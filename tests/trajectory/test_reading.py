"""What is wrong with a trajectory's file is told apart, and nothing in one is used unchecked."""

from __future__ import annotations

import copy
import json
import pickle
import random
import struct
import time
from dataclasses import replace
from typing import Any

import pytest
from crafted import a_run, ends, records, sealed, setup_of, setup_record
from models import block_mlp
from scripted import assert_same, snapshot
from small_runs import SHAPE

import zo_kernels as zo
from zo_kernels.trajectory import FaultyTrajectory
from zo_kernels.trajectory.record import MAGIC, Kind
from zo_kernels.trajectory.setups import as_text
from zo_kernels.trajectory.trajectory import read

RUNS = [
    {"method": "MeZO"},
    {"method": "MeZO", "groups": True, "directions": 3, "double": True},
    {"method": "MeZOSVRG", "directions": 2, "double": True},
    {"method": "MeZOSVRG", "groups": True},
]


@pytest.mark.parametrize("run", range(len(RUNS)))
def test_an_incomplete_record_and_damage_are_told_apart(run: int) -> None:
    """A file that ends anywhere, any flipped bit, and the zeros of a power cut."""
    data, draw = a_run(**RUNS[run]), random.Random(run)
    at_ends, steps = ends(data), read(data)[0].steps
    cuts = {*draw.sample(range(len(data)), 100), *range(at_ends[1] - 30, at_ends[4]), *range(30)}
    for size in cuts:
        _, sound, fault = read(data[:size])
        assert sound == max((end for end in at_ends if end <= size), default=0)
        assert fault is None if size in at_ends else fault is not None and fault.kind == "incomplete", size
    heads = {at + i for at in at_ends[:-1] for i in range(14)}
    for at in {*heads, *draw.sample(range(len(MAGIC), len(data)), 100)}:
        damaged = bytearray(data)
        damaged[at] ^= 1 << draw.randrange(8)
        found, sound, fault = read(bytes(damaged))
        assert fault is not None and fault.kind == "damaged", at
        assert sound == fault.byte == max(end for end in at_ends if end <= at)
        assert not fault.exact or found.steps + fault.steps == steps, at
    for end in at_ends[1:]:
        for zeros in (4, 8, 12, 24, 3000):
            _, sound, fault = read(data[:end] + bytes(zeros))
            assert sound == end and fault is not None and fault.kind == "damaged"


def test_a_record_that_seems_cut_off_before_a_sound_one_is_damaged() -> None:
    """Two bits of it, of which one makes it longer than the file."""
    parts = records(a_run(groups=True, directions=3))
    data = bytearray(sealed([*parts[:2], _probes(1)]))
    at = ends(bytes(data))[1]
    data[at + 5] ^= 2  # losses of twice the size
    data[at + 30] ^= 1
    _, sound, fault = read(bytes(data))
    assert sound == at and fault is not None and (fault.kind, fault.steps) == ("damaged", 2)
    assert read(bytes(data[: at + 40]))[2].kind == "incomplete"  # nobody can tell


def test_faults_are_told_with_what_to_do() -> None:
    data = a_run()
    end = ends(data)[5]
    with pytest.raises(
        FaultyTrajectory, match=rf"^run\.zo: record 5, at byte {end}: cut off after 7 .*; 3 steps.*`resume` cuts"
    ):
        zo.Trajectory.from_bytes(data[: end + 7], path="run.zo")
    assert zo.Trajectory.from_bytes(data[: end + 7], recover="incomplete").steps == 3
    damaged = data[: end + 20] + bytes([data[end + 20] ^ 1]) + data[end + 21 :]
    for recover in (False, "incomplete"):
        with pytest.raises(
            FaultyTrajectory, match=r"its checksum is wrong; 3 steps come before it, 7 are lost with.*recover=True"
        ):
            zo.Trajectory.from_bytes(damaged, recover=recover)
    assert zo.Trajectory.from_bytes(damaged, recover=True).steps == 3
    with pytest.raises(ValueError, match="recover: expected False, 'incomplete' or True, got 'all'"):
        zo.Trajectory.from_bytes(data, recover="all")
    try:
        zo.Trajectory.from_bytes(damaged)
    except FaultyTrajectory as error:
        there = pickle.loads(pickle.dumps(error))  # ranks send each other errors
        assert there.fault == error.fault and str(there) == str(error)


NEWER = {
    "a field": lambda parts: [setup_record({**setup_of(parts[0]), "more": 1}), *parts[1:]],
    "a field later": lambda parts: [*parts[:5], setup_record({**setup_of(parts[0]), "more": 1}), *parts[5:]],
    "a kind": lambda parts: [*parts[:5], b"\x09\0\0\0" + bytes(50), *parts[5:]],
    "a flag": lambda parts: [*parts[:5], b"\x01\x04" + parts[1][2:] + bytes(8), *parts[5:]],
    "a count": lambda parts: [*parts[:5], b"\x04\x01" + parts[1][2:], *parts[5:]],
}


@pytest.mark.parametrize("what", NEWER)
def test_newer_versions_are_not_taken_for_damage(what: str) -> None:
    data = sealed(NEWER[what](records(a_run())))
    found, _, fault = read(data)
    assert fault is not None and fault.kind == "unknown" and fault.steps >= 7
    with pytest.raises(ValueError, match=r"its checksum is right, but .*newer version"):
        zo.Trajectory.from_bytes(data)
    if what == "a field":
        with pytest.raises(ValueError, match="got also more"):  # nothing of it is ours
            zo.Trajectory.from_bytes(data, recover=True)
    else:
        assert zo.Trajectory.from_bytes(data, recover=True).steps == found.steps == 3


@pytest.mark.parametrize(
    ("field", "usual", "other"), [("distribution", "normal", "rademacher"), ("mask", "redrawn", "kept")]
)
def test_only_what_is_not_usual_is_named(field: str, usual: str, other: str) -> None:
    """Other runs have the bytes that earlier versions wrote; a field that they do not know makes them refuse."""
    parts = records(a_run())
    given = setup_of(parts[0])
    assert field not in given
    (_, setup), *_ = zo.Trajectory.from_bytes(sealed(parts)).setups
    assert getattr(setup, field) == usual and as_text(setup) == json.dumps(given, separators=(",", ":")).encode()
    named = json.loads(as_text(replace(setup, **{field: other})))
    assert named == {**given, field: other}
    others = [setup_record({**setup_of(part), field: other}) if part[0] == Kind.SETUP else part for part in parts]
    found = zo.Trajectory.from_bytes(sealed(others))
    assert getattr(found.setups[0][1], field) == other and found.steps == 10


def test_foreign_files_and_other_versions() -> None:
    rest = sealed(records(a_run()), b"ZOTRAJ2\n")
    for data, message in (
        (rest, "another version of zo_kernels wrote it"),
        (b"PK\x03\x04 and so on", "expected a trajectory, which begins with"),
        (bytes(100), "expected a trajectory"),
    ):
        for recover in (False, True, "incomplete"):
            with pytest.raises(FaultyTrajectory, match=message) as raised:
                zo.Trajectory.from_bytes(data, recover=recover)
            assert not raised.value.fault.recoverable
    damaged = b"ZOTRAJ3\n" + a_run()[8:]
    assert read(damaged)[2].kind == "damaged" and read(damaged)[2].steps == 10


def _changed(**fields: Any) -> Any:
    return lambda given: {**given, **fields}


def _weight(**fields: Any) -> Any:
    return lambda given: {**given, "weights": [{**given["weights"][0], **fields}, *given["weights"][1:]]}


def _without(name: str) -> Any:
    return lambda given: {k: v for k, v in given.items() if k != name}


# Of the run with two groups: what is changed in its first setup, and the field that is named.
SETUPS = [
    *((_changed(**{name: value}), name) for name, value in [
        ("method", 3), ("noise", None), ("step", -1), ("step", 1.5), ("step", 2**60), ("continues", 1), ("seed", -1),
        ("seed", 2**64), ("seed", True), ("directions", 0), ("directions", 10**8), ("directions", "1"), ("eps", 0),
        ("eps", float("nan")), ("eps", float("inf")), ("eps", -1.0), ("drop", 1.0), ("drop", -0.1), ("blocks", -1),
        ("blocks", 10**9), ("in_place", "yes"), ("stochastic", 0), ("weight_decays", []), ("distribution", None),
        ("distribution", "uniform"), ("distribution", ["normal"]), ("weight_decays", 0.5),
        ("mask", "fixed"), ("mask", None),
        ("weight_decays", [-1.0, 0.0]), ("weight_decays", [float("inf"), 0.0]), ("svrg", None), ("anchored", True),
        ("shared_direction", True), ("weights", []), ("weights", [3]),
    ]),
    *((_weight(**{name: value}), name) for name, value in [
        ("name", 1), ("shape", [-1]), ("shape", [10**18, 10**18]), ("shape", 3), ("shape", [1.0]),
        ("shape", [1] * 2000), ("dtype", "int8"), ("dtype", []), ("param_id", 2**32), ("param_id", -1), ("row", 4),
        ("row", -1), ("row", 10**6),
        ("block", 0), ("threshold", -1.0), ("threshold", "0"), ("fingerprint", "0"), ("fingerprint", 7),
    ]),
    (_weight(name="head.bias"), "weights: expected different names"),
    (_changed(weights={"a": 1}), "weights: expected a list, got dict"),
    (_changed(estimator="one"), "estimator: expected one of"),
    (_changed(normalize="std"), "directions: expected at least 2 where normalize is std, got 1"),
    (_changed(normalize="rms"), "rms: expected 4 numbers where normalize is rms, got 0"),
    (_changed(normalize="rms", rms=[1.5, 0, 0, 0]), "rms: beta: expected"),
    (_without("eps"), "eps"),
    (lambda given: [given], "setup"),
    (lambda given: b"{" * 100_000, "setup"),
    (lambda given: b"\xff\xfe", ""),
    (lambda given: b'{"method":"' + b"[" * 1_000_000, "deeply nested lists"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SETUPS)))
def test_every_field_of_a_setup_is_checked(number: int, two_groups: list[bytes]) -> None:
    change, named = SETUPS[number]
    data = sealed([setup_record(change(setup_of(two_groups[0]))), *two_groups[1:]])
    model = block_mlp(**SHAPE)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"its checksum is right, but .*{named}"):
        zo.replay(model, zo.Trajectory.from_bytes(data))
    assert_same(snapshot(model), before)


@pytest.fixture(scope="module")
def two_groups() -> list[bytes]:
    return records(a_run(groups=True))


@pytest.fixture(scope="module")
def svrg() -> list[bytes]:
    return records(a_run("MeZOSVRG"))


def _probes(n: int) -> bytes:
    return struct.pack("<BBHI", 4, 0, 0, n)


def _of_one_side(setup: bytes) -> bytes:
    return setup_record({**setup_of(setup), "estimator": "one_sided"})


def _weightless(given: Any) -> Any:
    return {**given, "weights": given["weights"][1:]}


PLAIN = b"\1\0\0\0" + struct.pack("<d2f", 0.1, 1.0, 1.0)
RECORDS = {
    "an anchor without svrg": (lambda a, b: [a[0], b[1]], "kind: expected one of STEP"),
    "a plain step with svrg": (lambda a, b: [b[0], PLAIN], "kind: expected one of ANCHOR"),
    "between without an anchor": (lambda a, b: [b[0], b[2]], "expected a step at an anchor before"),
    "more directions": (
        lambda a, b: [a[0], a[1][:2] + b"\1\0" + a[1][4:] + bytes(8)],
        "flags and count: expected 0 and 0 or 1 and 0",
    ),
    "a rate for each of one": (lambda a, b: [b[0], b[1][:1] + b"\1" + b[1][2:]], "flags and count: expected 0 and 0"),
    "probes": (lambda a, b: [a[0], _probes(3)], "probes: expected at most 2"),
    "probes of one side": (lambda a, b: [_of_one_side(a[0]), _probes(2)], "probes: expected at most 1"),
    "a two-sided step of one side": (lambda a, b: [_of_one_side(a[0]), a[1]], "kind: expected one of ONE_SIDED"),
    "one loss for all, two-sided": (lambda a, b: [a[0], a[1][:1] + b"\4" + a[1][2:]], "kind 1 with flags 4 and"),
    "a rate below 0": (lambda a, b: [b[0], b[1][:4] + struct.pack("<d", -1.0) + b[1][12:]], "rates: .*got -1"),
    "a rate of inf": (lambda a, b: [b[0], b[1][:4] + struct.pack("<d", float("inf")) + b[1][12:]], "rates: .*got inf"),
    "a check first": (lambda a, b: [a[0], b"\6\0\0\0" + bytes(8)], "expected a step between two fingerprints"),
    "no setup": (lambda a, b: [PLAIN], "expected a setup before it"),
    "another step count": (lambda a, b: [*a[:3], setup_record({**setup_of(a[0]), "step": 7})], "step: expected 2"),
    "another method": (lambda a, b: [*a[:3], b[0]], "method: expected MeZO"),
    "an anchor from nowhere": (
        lambda a, b: [b[0], _probes(1), setup_record({**setup_of(b[0]), "step": 1, "anchored": True})],
        "anchored: expected False",
    ),
    "other anchored weights": (
        lambda a, b: [*b[:3], setup_record({**_weightless(setup_of(b[0])), "step": 2, "anchored": True})],
        "weights: expected those of the setup before",
    ),
    "another normalizer": (
        lambda a, b: [*a[:3], setup_record({**setup_of(a[0]), "step": 2, "normalize": "rms", "rms": [0.5, 0, 0, 0]})],
        "normalize: expected none, as before, got rms",
    ),
    "other masks": (
        lambda a, b: [*a[:3], setup_record({**setup_of(a[0]), "step": 2, "mask": "kept"})],
        "mask: expected redrawn, as before, got kept",
    ),
    "other directions since the anchor": (
        lambda a, b: [
            *b[:3], setup_record({**setup_of(b[0]), "step": 2, "anchored": True, "distribution": "rademacher"})
        ],
        "distribution: expected normal, as of the directions since the anchor, got rademacher",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", RECORDS)
def test_every_record_is_checked(what: str, two_groups: list[bytes], svrg: list[bytes]) -> None:
    make, message = RECORDS[what]
    with pytest.raises(ValueError, match=f"its checksum is right, but {message}"):
        zo.Trajectory.from_bytes(sealed(make(two_groups, svrg)))


def test_losses_may_be_anything(two_groups: list[bytes]) -> None:
    step = two_groups[1]
    data = sealed([two_groups[0], step[:-8] + struct.pack("<2f", float("nan"), float("inf")), *two_groups[2:]])
    assert zo.Trajectory.from_bytes(data).refused_steps == 2
    model = block_mlp(**SHAPE)
    zo.replay(copy.deepcopy(model), zo.Trajectory.from_bytes(data), 1)


def test_an_optimizer_writes_no_setup_that_cannot_be_read(two_groups: list[bytes]) -> None:
    trajectory = zo.Trajectory()
    setup = zo.Trajectory.from_bytes(sealed(two_groups)).setups[0][1]
    with pytest.raises(ValueError, match="directions: expected an integer"):
        trajectory.add_setup(replace(setup, directions=0))
    assert trajectory.to_bytes() == MAGIC and not trajectory.setups


def test_whatever_is_in_a_file_takes_bounded_time() -> None:
    data = a_run()
    parts = {
        "zeros": bytes(1_000_000),
        "noise": random.Random(0).randbytes(1_000_000),
        "heads": b"\4\0\0\0" * 250_000,
        "heads of long records": b"\1\0\xff\xff" * 250_000,
        "setups": (struct.pack("<IBBHI", 1, 0, 0, 0, 30_000) + b'{"method":"') * 40_000,
    }
    for name, part in parts.items():
        began = time.process_time()
        _, sound, fault = read(data + part)
        assert sound == len(data) and fault is not None and fault.kind == "damaged", name
        assert time.process_time() - began < 2, name
    huge = {**setup_of(records(data)[0]), "directions": 2**16}
    long = [setup_record(huge), b"\1\0\xff\xff" + bytes(8 * (2**16 + 1))]
    assert zo.Trajectory.from_bytes(sealed(long)).steps == 1
