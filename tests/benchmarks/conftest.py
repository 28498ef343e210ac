"""What several tests of the benchmarks need: quick runs of a suite, and passes that are wrong."""

import csv
import json

import pytest

from benchmarks.__main__ import main
from benchmarks.bench import memory
from zo_kernels import ops


@pytest.fixture
def rows_of(tmp_path):
    """Run a suite quickly; return its exit status, its rows, and those of the CSV beside them."""

    def run(*arguments):
        file = tmp_path / "rows.json"
        status = main([*arguments, "--rounds", "2", "--seconds", "0", "--json", str(file)])
        return status, json.loads(file.read_text()), list(csv.DictReader(file.with_suffix(".csv").open()))

    return run


@pytest.fixture
def unwatched_memory(monkeypatch):
    """Calls whose memory would be measured are made without the profiler, which needs most of their time."""

    def unwatched(prepare):
        prepare()()
        return 0

    monkeypatch.setattr(memory, "_peak_cpu", unwatched)


@pytest.fixture
def wrong_passes(monkeypatch):
    """Every pass also moves the first weight by a little."""
    apply = ops.Table.apply

    def off(table, do, *then):
        apply(table, do, *then)
        table.entries[0].dst.view(-1)[0] += 1e-3

    monkeypatch.setattr(ops.Table, "apply", off)
