"""Every kind of call of the C++, in a build that `run.py` made with a sanitizer or without: `driver.py FOLDER`.

It prints a line for each kind with a digest of all memory after its calls: builds must agree. PyTorch is not imported,
so that nothing else is watched.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from cuda_calls import cuda_matrix, cuda_refusals
from memory import BITS, BOOL, NONE, RECORD, Tensor

SEEDS = [0, 2**64 - 1, 0x0123456789ABCDEF]
LAST = 2**63 - 1
NORMAL, SIGNS = 0, 1  # csrc/axpy.h: Distribution
# Elements and the index of the first: ragged ends, where a counter's high half changes, and the last indices.
SHARDS = [
    *((n, 0) for n in (0, 1, 4, 15, 31, 64, 500, 1025)),
    *((n, n % 7) for n in (2, 3, 17, 63, 127, 769)),
    (65, 2**34 - 37),
    (127, 2**34 - 64),
    (64, 2**34 - 32),
    (300, 2**35 - 140),
    (2049, 2**39 - 1000),
    (1000, 2**62 + 5),
    (33, 2**40 + 1),
    (1, LAST - 1),
    (100, LAST - 100),
    (4099, LAST - 4099),
    (800, (2**29 - 1) * 2**34 - 400),  # the last change of the high half
    (2**15 + 300, 2**34 - 2**14),  # several chunks: what scalar code takes long for
]
calls = refused = 0


def load(folder: Path, name: str) -> Any:
    """The module of that name in the folder."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(tensors: list[Tensor]) -> str:
    """Of all that the tensors hold."""
    return hashlib.sha256(b"".join(t.content() for t in tensors)).hexdigest()[:24]


def matrix(native: Any, which: str) -> Iterator[str]:
    """All dtypes, masks, roundings, in place and not, of one instruction set: by passes of one direction and of several
    with seeds that repeat, by one thread and several, over some entries and all.
    """
    global calls
    for dtype, mask, in_place in product(range(3), range(5), (True, False)):
        shards = SHARDS[:-1] if which == "scalar" else SHARDS
        tensors = [Tensor(n, at, dtype, mask, in_place, i) for i, (n, at) in enumerate(shards)]
        rows = [tuple(t.row()) for t in tensors]
        table, strided = native.Table(rows), native.Table(rows, strides(tensors))
        seeds, scales = [SEEDS[0], SEEDS[0], SEEDS[1], SEEDS[2]], [1e-3, -0.25, 3e-6, 1e-3]
        for z, stochastic, threads in ((NORMAL, False, 1), (NORMAL, True, 3), (SIGNS, False, 3), (SIGNS, True, 1)):
            table.run(SEEDS[:1], [1e-3, -2e-3], [1.0, 1.0], z, stochastic, None, threads, which)
            table.run(seeds, [*scales, *reversed(scales)], [0.9, 1.0], z, stochastic, None, threads, which)
            table.run(SEEDS[1:], [0.5, 0.1] * 2, [1.0, 0.5], z, stochastic, [len(shards) - 1, 3, 17], threads, which)
            strided.run(seeds[:2], [1e-3, -2e-3, 0.5, 0.1], [1.0, 0.9], z, stochastic, None, threads, which)
            calls += 4
        many = [(SEEDS[k % 3] + k) % 2**64 for k in range(70)]  # more signs than a sweep adds at once
        table.run(many, [1e-3] * 140, [0.9, 1.0], SIGNS, dtype > 0, [*range(12), len(shards) - 1], 2, which)
        calls += 1
        yield f"{which} dtype {dtype} mask {mask} in place {in_place}: {digest(tensors)}"


def strides(tensors: list[Tensor]) -> dict[int, tuple[tuple[int, ...], ...]]:
    """Shapes and strides of dst and src for those that have two or four columns: of all layouts of a matrix."""
    found: dict[int, tuple[tuple[int, ...], ...]] = {}
    for i, t in enumerate(tensors):
        columns = 4 if i % 2 and t.numel % 4 == 0 else 2
        if t.numel and t.numel % columns == 0:
            rows = t.numel // columns
            shape, plain = ((columns, rows), (rows, 1)) if i % 3 else ((rows, columns), (columns, 1))
            transposed = (1, shape[0])
            found[i] = (shape, transposed, transposed if t.in_place or i % 4 else plain)
    return found


Refusal = tuple[str, Callable[[list[list[Any]], dict[str, Any]], object]]


def crafted() -> Iterator[Refusal]:
    """Changes of what a right call gives, each of which must be refused. Columns are those of `Tensor.row`."""

    def put(row: int, column: int, value: Any) -> Callable[[list[list[Any]], dict[str, Any]], object]:
        return lambda rows, run: rows[row].__setitem__(column, value)

    for column, values in {
        0: [0, 1, 2**64 - 4, 2**64, -1, None],  # dst
        1: [0, 2, 2**64 - 4],  # src
        2: [-1, -(2**63), LAST, 10**6, 2**62, 2**63],  # numel
        3: [-1, -(2**63), LAST, LAST - 3, 2**63],  # offset
        4: [-1, 2**32],  # param_id
        5: [-1, 2, 10**6, 2**31 - 1, 2**31],  # group
        6: [-1, 3, 2**31],  # dtype
        7: [-1, 5, 99, 2**31],  # mask
        8: [None, "1"],  # threshold
        10: [-1, 0, 15],  # bytes of dst
        11: [-1, 0, 15],  # bytes of src
    }.items():
        for value in values:
            yield f"column {column} = {value}", put(0, column, value)
    for column, values in {9: [0, 2**64 - 1], 12: [-1, 0]}.items():  # the mask and its bytes
        for row, value in product((1, 2, 3), values):
            yield f"row {row}, column {column} = {value}", put(row, column, value)
    yield "the same dst twice", lambda rows, run: rows.append(list(rows[0]))
    yield "a dst within another", lambda rows, run: rows[0].__setitem__(0, rows[1][0] + 4)
    yield "src a part of dst", lambda rows, run: (put(0, 1, rows[0][0] + 4)(rows, run), put(0, 2, 3)(rows, run))
    yield "src another's dst", lambda rows, run: rows[0].__setitem__(1, rows[1][0])
    yield "a recorded mask in a dst", lambda rows, run: rows[3].__setitem__(9, rows[0][0])
    yield "a mask in a dst", lambda rows, run: rows[2].__setitem__(9, rows[0][0] + 1)
    for name, value in [
        *(("seeds", value) for value in ([], [1, 2], [-1], [2**64], None, [1.5])),
        *(("scales", value) for value in ([], [1.0], [1.0] * 3, [1.0] * 200, None, ["1"])),
        *(("decays", value) for value in ([], [1.0], [1.0] * 3, None)),
        *(("distribution", value) for value in (-1, 2, 2**31, 2**64, None, 0.5)),
        *(("active", value) for value in ([4], [-1], [0, 0], [2**62], [2**63], [0, 1, 2, 3, 0], ["0"], 0)),
        *(("threads", value) for value in (0, -1, -(2**31), 2**16 + 1, 2**40)),
        *(("which", value) for value in ("", "sse", None)),
    ]:
        yield f"{name} = {value}", lambda rows, run, name=name, value=value: run.__setitem__(name, value)


def refusals(native: Any) -> Iterator[str]:
    """No crafted call goes through, and none changes anything."""
    global refused
    tensors = [Tensor(4, 0, 0, mask, True, i) for i, mask in enumerate((NONE, BOOL, BITS, RECORD))]
    before = digest(tensors)
    for name, change in crafted():
        rows = [t.row() for t in tensors]
        run: dict[str, Any] = {"seeds": [1], "scales": [1.0, 1.0], "decays": [1.0, 1.0], "distribution": NORMAL}
        run |= {"stochastic": False, "active": None, "threads": 1, "which": "scalar"}
        change(rows, run)
        try:
            native.Table([tuple(row) for row in rows]).run(*run.values())
        except (ValueError, TypeError, OverflowError):
            refused += 1
        else:
            sys.exit(f"went through: {name}")
        if digest(tensors) != before:
            sys.exit(f"changed something: {name}")
    yield f"refused: {before}"


def together(native: Any, which: str) -> Iterator[str]:
    """Passes of several Python threads at the same time: over memory of their own they do not see each other; over the
    same, one is done or refused as a whole.
    """
    global calls, refused
    n = 2**15 + 5 if which == "scalar" else 3 * 2**15 + 5
    tensors = [Tensor(n, 0, 0, NONE, True, i) for i in range(3)]
    own = [native.Table([tuple(t.row())]) for t in tensors]
    again = native.Table([tuple(tensors[2].row())])
    done, outcomes = [], []

    def add(table: Any) -> None:
        table.run([5], [1e-3] * 2, [1.0, 1.0], SIGNS, False, None, 2, which)

    def work(table: Any, shared: Any) -> None:
        for _ in range(8):
            add(table)
            try:
                add(shared)
            except RuntimeError as error:
                outcomes.append(str(error))
            else:
                done.append(1)

    threads = [threading.Thread(target=work, args=each) for each in ((own[0], own[2]), (own[1], again))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all("another thread" in each for each in outcomes):
        sys.exit(f"wrong errors: {outcomes}")
    alone = Tensor(n, 0, 0, NONE, True, 2)
    table = native.Table([tuple(alone.row())])
    for _ in done:
        add(table)
    if alone.content() != tensors[2].content():
        sys.exit("two threads made garbage of a tensor")
    calls += 16 + 2 * len(done)
    refused += len(outcomes)
    yield f"{which} together: {digest(tensors[:2])}"


def leaks(native: Any, allocated: Callable[[], int]) -> None:
    """Tables, passes and refusals leave nothing behind."""

    def all_kinds() -> None:
        for _ in matrix(native, "scalar"):
            break
        list(refusals(native))

    for _ in range(2):
        all_kinds()
    gc.collect()
    before = allocated()
    for _ in range(10):
        all_kinds()
    gc.collect()
    if (grown := allocated() - before) > 4096:  # the interpreter's own lists may have grown
        sys.exit(f"leaked {grown} bytes in 10 rounds")


def main(folder: Path) -> None:
    """All of it; what goes wrong ends the process with another status than 0."""
    native, cuda = load(folder, "_native"), load(folder, "_cuda")
    for which in native.instruction_sets():
        for line in (*matrix(native, which), *together(native, which)):
            print(line)
    for line in refusals(native):
        print(line)
    print(native.philox4x32([1, 2, 3, 4], [5, 6]), native.radius_range(2**31 - 1000, 2**31 + 1000))
    count, more = 0, cuda_refusals(cuda)
    for line in cuda_matrix(cuda, SHARDS, digest):
        count += 2
        print(line)
    try:
        import ctypes

        allocated = ctypes.CDLL(None).__sanitizer_get_current_allocated_bytes
        allocated.restype = ctypes.c_size_t
        leaks(native, allocated)
    except AttributeError:  # no sanitizer that counts
        pass
    print(f"counts {calls + count} {refused + more}", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
