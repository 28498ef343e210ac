"""The experiments of `exactness` on a tiny encoder: what they check and measure."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("rich")

from tiny_run import tiny_encoder, write_table

import zo_kernels as zo
from benchmarks.exactness.upcast import upcast


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny encoder; its task has a few dozen texts."""
    pytest.importorskip("transformers")
    from benchmarks.exactness import demo_task
    from zo_kernels.finetune.data.splits import read_table, split

    folder = tmp_path_factory.mktemp("tiny")
    texts = read_table(write_table(folder / "texts.tsv"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            demo_task, "_docstrings", lambda seed: split(texts, seed=seed, held_out=dict.fromkeys(texts, (5, 5)))
        )
        yield str(tiny_encoder(folder))


@pytest.fixture
def exactness(rows_of, tiny, monkeypatch):
    """Run experiments quickly."""
    monkeypatch.setattr("benchmarks.exactness.replayed._REAL", 6)
    given = ["--model", tiny, "--threads", "1", "--steps", "40", "--run-steps", "3", "--seeds", "0", "1"]
    return lambda only, *more: rows_of("exactness", "--only", only, *given, *more)


def test_drift_in_place_and_none_in_the_forward(exactness):
    status, found, _ = exactness("^drift")
    assert status == 0 and len(found) == 10 * 2 and {row["steps"] for row in found} == {1, 40}
    for row in found:
        assert row["correct"] is True and row.get("seconds_median") is None and row["elements"] == 16 * 32
        drifted = row["perturb"] == "in_place"
        assert (row["share_changed"] > 0.2) == drifted == (row["relative_rms"] > 0) == (row["largest"] > 0)
        assert row["relative_rms"] < (1e-6 if row["dtype"] == "fp32" else 0.1)


def test_small_updates_survive_stochastic_rounding(exactness):
    status, found, _ = exactness("^survival", "--draws", "16")
    assert status == 0 and len(found) == 2 * 2 * 5
    for row in found:
        if row["update"] == 1e-7:
            lost = row["rounding"] == "nearest"
            assert (row["left"] < 0.3) == lost
            assert lost or abs(row["left"] - 1) < 5 * row["left_standard_error"]


def test_four_ways_to_run_in_16_bits(exactness):
    status, found, _ = exactness("^four/bf16/in_forward")
    assert status == 0 and len(found) == 2 * 3
    assert [row["run_seed"] for row in found[:3]] == [0, 1, None]
    for first, second, mean in zip(found[::3], found[1::3], found[2::3], strict=True):
        assert mean["dev_loss"] == pytest.approx((first["dev_loss"] + second["dev_loss"]) / 2)
        assert mean["runs"] == 2 and mean["dev_loss_sd"] > 0 and 0 <= mean["test_accuracy"] <= 1


def test_replay_is_timed_and_measured(exactness):
    status, found, _ = exactness("^replay")
    assert status == 0 and len(found) == 4 + 2 * 3
    whole = [row for row in found if row["baseline"] != "normals"]
    pairs = [row for row in found if row["baseline"] == "normals"]
    assert [row["distribution"] for row in pairs] == ["rademacher"] * 3
    assert all(row["ratio"] > 0 and row["samples"] >= 3 and row["target"] is None for row in pairs)
    for row in whole:
        assert row["steps"] == 40 and row["real_steps"] == 6 and row["bytes_a_step"] == 24
        assert row["file_bytes"] > 40 * 24 and row["baseline"] == "training" and row["ratio"] > 0
        assert row["replay_seconds"] == pytest.approx(40 * row["seconds_median"])


def test_what_sharing_z_could_save(exactness):
    status, found, _ = exactness("^shared-z")
    assert status == 0 and len(found) == 4
    for copied, step in zip(found[::2], found[1::2], strict=True):
        assert copied["baseline"] == "copy_" and copied["saved_share_at_most"] is None
        assert 0 <= step["saved_share_at_most"] < 1
        assert step["price_mib"] == pytest.approx(step["elements"] * (4 if step["dtype"] == "fp32" else 2) / 2**20)


@pytest.mark.parametrize(
    "case",
    [
        "drift/fp32/in_place/nearest",
        "drift/bf16/in_forward/stochastic",
        "survival/fp16/nearest",
        "four/bf16/in_place/stochastic",
        "replay/fp32/mezo/in_place",
        "replay/fp32/lezo/in_place",
        "replay/bf16/mezo/in_forward",
        "replay/fp32/mezo/in_place/rademacher",
        "shared-z/bf16",
    ],
)
def test_wrong_passes_have_no_figures(exactness, wrong_passes, case):
    status, found, _ = exactness(f"^{case}$")
    (row,) = found
    assert status == 1 and row["correct"] is False and row["wrong"]
    figures = ("seconds_median", "share_changed", "left", "dev_loss", "replay_seconds", "saved_share_at_most")
    assert not any(row.get(name) is not None for name in figures)


def test_replay_of_another_run_is_wrong(exactness, monkeypatch):
    replay = zo.replay

    def off(module, *arguments):
        replay(module, *arguments)
        with torch.no_grad():
            next(module.parameters()).view(-1)[0] += 1.0

    monkeypatch.setattr(zo, "replay", off)
    status, found, _ = exactness("^replay/fp32/mezo/in_forward")
    assert status == 1 and found[0]["wrong"].startswith("1 of the weights replayed with 1 threads")


def test_widened_weights_are_read_when_the_module_runs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2, bias=False))
    model.to(torch.bfloat16)
    wide, ids = copy.deepcopy(model).float(), torch.tensor([0, 3])
    upcast(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.equal(model(ids), wide(ids)) and torch.equal(copy.deepcopy(model)(ids), wide(ids))
    with torch.no_grad():
        for p in (*model.parameters(), *wide.parameters()):
            p.data = p.data * 2
    assert torch.equal(model(ids), wide(ids))
