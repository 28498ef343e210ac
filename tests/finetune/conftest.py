"""What several tests of zo-finetune start with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_encoder, tiny_options, whole_run, write_table


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached where they are forgotten. Tests without data sets do not wait for `datasets`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all the rest of a run."""
    from zo_kernels.finetune.runs import report

    monkeypatch.setattr(report, "draw_curves", lambda records, path: None)


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run of two steps, all but its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_options(tiny_encoder(folder / "tiny"), write_table(folder / "words.tsv")) | {"steps": 2}


@pytest.fixture(scope="session")
def finished(two_steps: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    whole_run({**two_steps, "out": str(out)}, resume=False)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
