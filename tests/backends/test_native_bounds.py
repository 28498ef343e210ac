"""Numbers that do not fit: no table or pass reaches memory that is not its own, whoever makes it, and says why."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from matrix import DEVICE, DISTRIBUTIONS

from zo_kernels import backends, ops
from zo_kernels.backends import native, reference
from zo_kernels.backends.types import Entry, MaskKind, Pass

CPU = torch.device("cpu")
# The instruction sets share their checks.
WHERE = [(name, CPU) for name in backends.available(CPU) if ":" not in name]
WHERE += [(name, DEVICE) for name in backends.available(DEVICE) if DEVICE.type == "cuda" and name != "reference"]
SCALAR = pytest.mark.skipif("scalar" not in native.instruction_sets(), reason="the native extension is not built")
LAST = 2**63 - 1

# ---------------------------------------------------------------------------------------------------------------------
# What `_native` is given: the columns of a row of its table, or an argument of a pass, and what it must say.

DST, SRC, NUMEL, OFFSET, _, GROUP, DTYPE, MASK, _, DATA, DST_BYTES, SRC_BYTES, MASK_BYTES = range(13)
ROWS: dict[str, tuple[int, int, Any, str]] = {
    "no dst": (0, DST, 0, r"entries\[0\]: dst: expected an address, got none"),
    "no src": (0, SRC, 0, r"entries\[0\]: src: expected an address"),
    "odd dst": (0, DST, 2**20 + 2, r"dst: expected an address that is a multiple of 4, got 1048578"),
    "dst at the end of the address space": (0, DST, 2**64 - 4, r"dst: expected 32 bytes .* got an address space"),
    "numel -1": (0, NUMEL, -1, r"entries\[0\]: numel: expected at least 0, got -1"),
    "numel 9": (0, NUMEL, 9, r"entries\[0\]: dst: expected 36 bytes, got 32"),
    "numel 2**62": (0, NUMEL, 2**62, r"numel: expected at most 2\^63 - 1 bytes, got 4611686018427387904 elements"),
    "offset -1": (0, OFFSET, -1, r"offset: expected at least 0, got -1"),
    "offset beyond the last index": (0, OFFSET, LAST - 7, r"offset: expected at most 2\^63 - 1 - numel, got 92233"),
    "group -1": (0, GROUP, -1, r"group: expected at least 0, got -1"),
    "group 2 of 2": (0, GROUP, 2, r"decays: expected one for each of the table's 3 groups, got 2"),
    "group 10**6": (0, GROUP, 10**6, r"decays: expected one for each of the table's 1000001 groups, got 2"),
    "dtype 3": (0, DTYPE, 3, r"dtype: expected 0 to 2, got 3"),
    "dtype -1": (0, DTYPE, -1, r"dtype: expected 0 to 2, got -1"),
    "mask 5": (0, MASK, 5, r"mask: expected 0 to 4, got 5"),
    "mask without memory": (0, MASK, 2, r"entries\[0\]: mask: expected 8 bytes, got 0"),
    "no mask": (1, DATA, 0, r"entries\[1\]: mask: expected an address, got none"),
    "short src": (0, SRC_BYTES, 31, r"src: expected 32 bytes, got 31"),
    "short dst": (0, DST_BYTES, 31, r"dst: expected 32 bytes, got 31"),
    "short bools": (1, MASK_BYTES, 7, r"entries\[1\]: mask: expected 8 bytes, got 7"),
    "short bits": (2, MASK_BYTES, 0, r"entries\[2\]: mask: expected 1 bytes, got 0"),
}
RUNS: dict[str, tuple[int, Any, str]] = {
    "no seeds": (0, [], r"seeds: expected at least 1, got 0"),
    "a seed more": (0, [1, 2], r"scales: expected 2 rows of 2 numbers.*got 2 numbers"),
    "a scale less": (1, [1.0], r"scales: expected 2 rows of 1 numbers.*got 1 numbers"),
    "no scales": (1, [], r"scales: expected 2 rows"),
    "a decay less": (2, [1.0], r"decays: expected one for each of the table's 2 groups, got 1"),
    "a decay more": (2, [1.0] * 3, r"scales: expected 3 rows of 1 numbers"),
    "distribution 2": (3, 2, r"distribution: expected 0 or 1, got 2"),
    "distribution -1": (3, -1, r"distribution: expected 0 or 1, got -1"),
    "entry 3 of 3": (5, [3], r"active: expected indices of the table's 3 entries, got 3"),
    "entry -1": (5, [0, -1], r"active: .*got -1"),
    "an entry twice": (5, [0, 2, 0], r"active: expected each entry once, got 0 twice"),
    "no thread": (6, 0, r"threads: expected 1 to 65536, got 0"),
    "too many threads": (6, 2**31 - 1, r"threads: expected 1 to 65536, got 2147483647"),
}


class Plain:
    """Three entries, of no mask, of bools and of recorded bits."""

    def __init__(self) -> None:
        self.weights = [torch.full((8,), 0.5) for _ in range(3)]
        self.masks = [torch.empty(0), torch.ones(8, dtype=torch.bool), torch.full((1,), 7, dtype=torch.uint8)]
        kinds = [MaskKind.NONE, MaskKind.BOOL, MaskKind.RECORD]
        self.rows = [
            [w.data_ptr(), w.data_ptr(), 8, 0, i, i % 2, 0, int(kind), 1.0, m.data_ptr(), 32, 32, m.nbytes]
            for i, (w, m, kind) in enumerate(zip(self.weights, self.masks, kinds, strict=True))
        ]
        self.run: list[Any] = [[1], [1.0, 1.0], [1.0, 1.0], 0, False, None, 1, "scalar"]

    def call(self) -> None:
        native._native.Table([tuple(row) for row in self.rows]).run(*self.run)

    @property
    def untouched(self) -> bool:
        return all(bool((w == 0.5).all()) for w in self.weights) and self.masks[2].item() == 7


@SCALAR
@pytest.mark.parametrize("name", [*ROWS, *RUNS])
def test_native_refuses(name: str) -> None:
    plain = Plain()
    if name in ROWS:
        row, column, value, message = ROWS[name]
        plain.rows[row][column] = value
    else:
        argument, value, message = RUNS[name]
        plain.run[argument] = value
    with pytest.raises(ValueError, match=message):
        plain.call()
    assert plain.untouched


@SCALAR
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_native_does_the_rest(distribution: str) -> None:
    plain = Plain()
    plain.run[3] = DISTRIBUTIONS.index(distribution)
    plain.call()
    assert not plain.untouched
    [w] = torch.zeros(1, 64)
    native._native.Table([(w.data_ptr(), w.data_ptr(), 64, LAST - 64, 0, 0, 0, 0, 0.0, 0, 256, 256, 0)]).run(*plain.run)
    want = torch.zeros(64)
    reference.prepare([Entry(want, want, 0, LAST - 64)])(Pass([1], [[1.0]], [1.0], distribution=distribution))
    assert torch.equal(w, want)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and passes that somebody makes by hand, on every backend.

Make = Callable[[torch.Tensor, torch.Tensor], list[Entry]]  # of two tensors of eight elements


def masked(kind: MaskKind, mask: Callable[[torch.device], Any], threshold: Any = 1.0) -> Make:
    return lambda w, v: [Entry(w, w, 0, mask=kind, threshold=threshold, mask_tensor=mask(w.device))]


def ones(n: int, dtype: torch.dtype = torch.uint8) -> Callable[[torch.device], torch.Tensor]:
    return lambda where: torch.ones(n, dtype=dtype, device=where)


BITS, BOOL, RECORD = MaskKind.BITS, MaskKind.BOOL, MaskKind.RECORD
TABLES: dict[str, tuple[Make, type[Exception], str]] = {
    "a smaller src": (lambda w, v: [Entry(w, v[:4], 0)], ValueError, r"src: expected the number of elements of dst, 8"),
    "a larger src": (lambda w, v: [Entry(w[:4], v, 0)], ValueError, r"src: expected the number of elements of dst, 4"),
    "src of another dtype": (lambda w, v: [Entry(w, v.half(), 0)], ValueError, r"src: expected the dtype of dst"),
    "src that is nothing": (lambda w, v: [Entry(w, None, 0)], TypeError, r"src: expected a torch.Tensor, got NoneType"),
    "src elsewhere": (lambda w, v: [Entry(w, v.to("meta"), 0)], ValueError, r"src: .*meta"),
    "src a part of dst": (
        lambda w, v: [Entry(w[:6], w[2:], 0)],
        ValueError,
        r"entries\[0\]: src: expected memory that no",
    ),
    "src another's dst": (
        lambda w, v: [Entry(w, v, 0), Entry(v, v, 1)],
        ValueError,
        r"reads and another writes",
    ),
    "dst twice": (lambda w, v: [Entry(w, w, 0), Entry(w[4:], w[4:], 1)], ValueError, r"do not overlap"),
    "a group of -1": (lambda w, v: [Entry(w, w, 0, group=-1)], ValueError, r"group: expected an integer .*got -1"),
    "a group of 2**31": (lambda w, v: [Entry(w, w, 0, group=2**31)], ValueError, r"group: .*got 2147483648"),
    "a group of 0.5": (lambda w, v: [Entry(w, w, 0, group=0.5)], TypeError, r"group: .*got float"),
    "an offset of -8": (lambda w, v: [Entry(w, w, 0, -8)], ValueError, r"offset: .*got -8"),
    "an offset at the end": (lambda w, v: [Entry(w, w, 0, LAST - 7)], ValueError, r"offset: .*got 92233"),
    "a mask of 2": (masked(2, ones(8, torch.bool)), TypeError, r"mask: expected a MaskKind, got int 2"),
    "no bools": (masked(BOOL, lambda where: None), TypeError, r"mask_tensor: expected 8 of torch.bool, got NoneType"),
    "bools for bits": (masked(BITS, ones(1, torch.bool)), ValueError, r"mask_tensor: expected 1 of torch.uint8"),
    "bits for bools": (masked(BOOL, ones(8)), ValueError, r"mask_tensor: expected 8 of torch.bool"),
    "too few bools": (masked(BOOL, ones(7, torch.bool)), ValueError, r"expected 8 of torch.bool, got 7"),
    "too few bits": (masked(RECORD, ones(0)), ValueError, r"mask_tensor: expected 1 of torch.uint8, got 0"),
    "every second bool": (
        masked(BOOL, lambda where: torch.ones(16, dtype=torch.bool, device=where)[::2]),
        ValueError,
        r"mask_tensor: expected a contiguous",
    ),
    "bools elsewhere": (masked(BOOL, lambda where: ones(8, torch.bool)(torch.device("meta"))), ValueError, r"got meta"),
    "a threshold of nan": (masked(RECORD, ones(1), math.nan), ValueError, r"threshold: expected a number, got nan"),
    "a threshold in words": (masked(RECORD, ones(1), "1"), TypeError, r"threshold: expected a number, got str"),
    "a mask that is recorded over the weights": (
        lambda w, v: [Entry(w, w, 0, mask=RECORD, threshold=1.0, mask_tensor=w.view(torch.uint8)[3:4])],
        ValueError,
        r"do not overlap",
    ),
    "memory at an odd address": (
        lambda w, v: [
            Entry(w, torch.frombuffer(bytearray(64), dtype=torch.float32, count=8, offset=1).to(w.device), 0)
        ],
        ValueError,
        r"src: expected memory at a multiple of 4 bytes, got \d+; use a clone\(\)",
    ),
}
PASSES: dict[str, tuple[dict[str, Any], str]] = {
    "no seeds": ({"seeds": [], "scales": [[], []]}, r"seeds: expected at least (one direction|1)"),
    "a row less": ({"scales": [[1.0]]}, r"scales: expected a row for each of 2 decays, got 1"),
    "a row more": ({"scales": [[1.0]] * 3}, r"scales: expected a row for each of 2 decays, got 3"),
    "a short row": ({"seeds": [1, 2], "scales": [[1.0, 1.0], [1.0]]}, r"scales\[1\]: expected a number for each of 2"),
    "rows that are even only together": (
        {"seeds": [1, 2], "scales": [[1.0], [1.0] * 3]},
        r"scales\[0\]: expected a number for each of 2 seeds, got 1",
    ),
    "a group too many": (
        {"scales": [[1.0]], "decays": [1.0]},
        r"decays: expected one for each of the table's 2 groups",
    ),
    "a distribution that is none": (
        {"distribution": "cauchy"},
        r"distribution: expected normal or rademacher, got 'cauchy'",
    ),
    "no groups": ({"scales": [], "decays": []}, r"decays: expected one for each of the table's 2 groups, got 0"),
    "entry 2 of 2": ({"active": [0, 2]}, r"active: expected indices of the table's 2 entries, got 2"),
    "entry -1": ({"active": [-1]}, r"active: .*got -1"),
    "entry 0 twice": ({"active": [0, 1, 0]}, r"active: expected each entry once"),
    "a tensor of too few scales": (
        {"scales": torch.ones(2, 1), "seeds": [1, 2]},
        r"scales\[0\]: expected a number for",
    ),
    "a tensor of too few rows": ({"scales": torch.ones(1, 1)}, r"scales: expected a row for each of 2 decays, got 1"),
    "scales without rows": ({"scales": [1.0, 1.0]}, r"scales\[0\]: expected a number for each of 1 seeds, got float"),
    "a flat tensor of scales": ({"scales": torch.ones(2)}, r"scales: expected a float tensor of 2 dimensions"),
    "a tensor of too few decays": ({"decays": torch.ones(1)}, r"scales: expected a row for each of 1 decays, got 2"),
    "seeds half tensors": (
        {"seeds": [torch.tensor(1), 2], "scales": [[1.0] * 2] * 2},
        r"seeds: expected numbers, or scalar int64 tensors",
    ),
}
everywhere = pytest.mark.parametrize("backend, where", WHERE, ids=lambda v: str(v))


def two(where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((8,), 0.5, device=where), torch.full((8,), 0.25, device=where)


@everywhere
@pytest.mark.parametrize("name", TABLES)
def test_tables_refuse(name: str, backend: str, where: torch.device) -> None:
    make, error, message = TABLES[name]
    w, v = two(where)
    entries = make(w, v)
    if "odd address" in name and where.type != "cpu":
        pytest.skip("there memory is copied to")
    with pytest.raises(error, match=message):
        ops.Table(entries, [f"entries[{i}]" for i in range(len(entries))], backend)
    with pytest.raises(error, match=message):
        backends.resolve(backend, where).prepare(entries)
    assert bool((w == 0.5).all() and (v == 0.25).all())


@everywhere
@pytest.mark.parametrize("name", PASSES)
def test_passes_refuse(name: str, backend: str, where: torch.device) -> None:
    change, message = PASSES[name]
    w, v = two(where)
    entries = [Entry(w, w, 0, group=0), Entry(v, v, 1, group=1)]
    right = Pass([1], [[1.0], [1.0]], [1.0, 1.0])
    numbers = {k: x.to(where) if isinstance(x, torch.Tensor) else x for k, x in change.items()}
    table, run = ops.Table(entries, ["w", "v"], backend), backends.resolve(backend, where).prepare(entries)
    for call in (table.apply, run):
        with pytest.raises(ValueError, match=message):
            call(replace(right, **numbers))
    assert bool((w == 0.5).all() and (v == 0.25).all())
    if backend != "triton" or where.type == "cuda":  # an interpreter takes its time
        table.apply(right)
        assert not bool((w == 0.5).any())


@everywhere
def test_stretches_refuse(backend: str, where: torch.device) -> None:
    """Of entries that fall into several."""
    w, v = two(where)
    bits = torch.zeros(1, dtype=torch.uint8, device=where)
    for runs, entry, message in (
        ([[0, 8, 16]], Entry(w, w, 0), r"w: runs: expected stretches of equal length, got 3 of 8 elements"),
        ([[]], Entry(w, w, 0), r"w: runs: expected stretches of equal length, got 0"),
        ([[0, -8]], Entry(w, w, 0), r"w: offset: .*got -8"),
        ([[0, LAST]], Entry(w, w, 0), r"w: offset: .*got 92233"),
        ([[0, 8]], Entry(w, w, 0, 0, 0, RECORD, 1.0, bits), r"w: mask_tensor: expected 2 of torch.uint8, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.Table([entry], ["w"], backend, runs)
    table = ops.Table([Entry(w, w, 0), Entry(v, v, 1)], ["w", "v"], backend, [[0, 8], [0]])
    for active in ([2], [-1], [0, 0]):
        with pytest.raises(ValueError, match=r"active: "):
            table.apply(Pass([1], [[1.0]], [1.0], active=active))
    assert bool((w == 0.5).all() and (v == 0.25).all())


@everywhere
def test_a_mask_whose_memory_was_replaced_is_not_read(backend: str, where: torch.device) -> None:
    w, mask = torch.full((8,), 0.5, device=where), torch.ones(8, dtype=torch.bool, device=where)
    table = ops.Table([Entry(w, w, 0, mask=BOOL, mask_tensor=mask)], ["w"], backend)
    mask.resize_(2**20)
    with pytest.raises(RuntimeError, match="memory was replaced"):
        table.apply(Pass([1], [[1.0]], [1.0]))
    assert bool((w == 0.5).all())


# ---------------------------------------------------------------------------------------------------------------------
# One tensor in two threads.


def a_long_pass(n: int = 2**20) -> tuple[torch.Tensor, Callable[[], None]]:
    w = torch.zeros(n)
    table, do = ops.Table([Entry(w, w, 0)], ["w"], "native"), Pass([3] * 8, [[1e-3] * 8], [1.0])
    return w, lambda: table.apply(do)


@SCALAR
@pytest.mark.parametrize("same", [True, False], ids=["one table", "two tables"])
def test_a_tensor_is_changed_by_one_pass_at_a_time(same: bool) -> None:
    """Whatever is refused is refused as a whole, and what is not is done as a whole."""
    w, first = a_long_pass()
    second = first
    if not same:
        part, do = w[-(2**18) :], Pass([5], [[0.0]], [1.0])  # it would read and write back what the first changes
        table = ops.Table([Entry(part, part, 1)], ["part"], "native")
        second = lambda: table.apply(do)  # noqa: E731
    done, refused, ends = [0, 0], [], threading.Event()

    def work(which: int, call: Callable[[], None]) -> None:
        while not ends.is_set():
            try:
                call()
            except RuntimeError as error:
                refused.append(str(error))
                ends.set()
            else:
                done[which] += 1
            if done[which] == 500:
                ends.set()

    threads = [threading.Thread(target=work, args=each) for each in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused and all("pass in another thread works on the same memory" in message for message in refused)
    want, again = a_long_pass()
    for _ in range(sum(done) if same else done[0]):
        again()
    assert torch.equal(w, want)
    first()  # nothing is left locked


@SCALAR
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_that_is_forked_in_a_pass_may_run_its_own() -> None:
    """The passes of the parent's threads are not under way in it."""
    _, run = a_long_pass()
    ends = threading.Event()

    def work() -> None:
        while not ends.is_set():
            run()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            if not (child := os.fork()):
                try:
                    run()
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        ends.set()
        thread.join()


@SCALAR
def test_a_table_keeps_its_tensors() -> None:
    w = torch.zeros(2**16)
    run = native.Native().prepare([Entry(w, w, 0)])
    alias = w.view(-1)
    del w
    gc.collect()
    others = [torch.ones(2**16) for _ in range(4)]
    run(Pass([1], [[1.0]], [1.0]))
    assert bool((alias != 0).all()) and all(bool((o == 1).all()) for o in others)
