"""What tests of tasks, prompts and sweeps have in common."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached where they are forgotten."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def whole_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, which take longer than all the rest."""
    from zo_kernels.finetune import report

    monkeypatch.setattr(report, "draw_curves", lambda records, path: None)
