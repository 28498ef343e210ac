"""`python -m benchmarks peers`: rows, what its checks refuse, and what cannot run."""

import csv
import json
import textwrap
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.__main__ import main, parser
from benchmarks.bench.registry import Unavailable
from benchmarks.bench.timing import Plan
from benchmarks.peers import CHECKOUTS, cases, figure
from benchmarks.peers.adapters import PEERS
from benchmarks.peers.check import Settings, wrong_step
from benchmarks.peers.checkout import methods
from benchmarks.peers.measure import Side, Spec, measure
from benchmarks.step.shapes import SHAPES, Batch

SETTINGS = Settings(lr=1e-4, eps=1e-3, seed=1)

# A checkout of zo2 as its users have it, less what does not matter here: MeZO as published.
CONFIG = """
from dataclasses import dataclass

@dataclass
class MeZOSGDConfig:
    lr: float = 1e-3
    weight_decay: float = 0.1
    eps: float = 1e-3
    zo2: bool = True
"""
OPTIMIZER = """
import torch
from ...config.mezo_sgd import MeZOSGDConfig

class MeZOSGD:
    def __init__(self, model, config):
        self.params, self.config = list(model.parameters()), config

    @torch.no_grad()
    def move(self, scale, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in self.params:
            p += scale * torch.randn(p.shape, generator=generator)

    def zo_forward(self, zo_random_seed):
        eps, seed = self.config.eps, zo_random_seed
        self.move(eps, seed)
        above = self.inner_zo_forward().item()
        self.move(-2 * eps, seed)
        below = self.inner_zo_forward().item()
        self.move(eps, seed)
        self.move(-self.config.lr * (above - below) / (2 * eps), seed)
"""


@pytest.fixture
def checkout(tmp_path):
    """Writes a package with an optimizer, in which some text was replaced; returns its path."""

    def write(old="", new=""):
        assert old in OPTIMIZER
        for name, text in (("config/mezo_sgd.py", CONFIG), ("optimizer/mezo_sgd/zo.py", OPTIMIZER.replace(old, new))):
            file = tmp_path / "zo2" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            for folder in (file.parent, file.parent.parent):
                if folder.name != "zo2":
                    (folder / "__init__.py").touch()
            file.write_text(textwrap.dedent(text))
        (tmp_path / "zo2" / "__init__.py").write_text("raise RuntimeError('needs a GPU')")
        return str(tmp_path)

    return write


@pytest.fixture(autouse=True)
def no_module_stays(monkeypatch):
    """A checkout's modules are a process's own, and here one process has several."""
    import sys

    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "zo2":
            del sys.modules[name]


def spec(experiment, peer, path=None, steps=2):
    return Spec(experiment, peer, path, "tiny", Batch(2, 4), 1, SETTINGS, steps, [1, 2], Plan(2, 0.0))


def wrong(peer, path=None):
    """What is wrong with a step of a peer on the tiny model."""
    task = SHAPES["tiny"].build(Batch(2, 4), torch.device("cpu"), torch.float32)
    side = Side(spec("exact", peer, path).load(), task, SETTINGS)
    return side.wrong()


@pytest.mark.parametrize("peer", ["ours", "ours-in-forward", "published"])
def test_what_needs_no_other_package_makes_steps_of_spsa(peer):
    assert wrong(peer) is None


def test_a_checkout_runs_although_its_package_cannot_be_imported(checkout):
    assert wrong("zo2", checkout()) is None


def test_the_outside_check_agrees_with_the_exact_one_on_our_steps():
    task = SHAPES["tiny"].build(Batch(2, 4), torch.device("cpu"), torch.float32)
    side = Side(PEERS["ours"](), task, SETTINGS)
    assert wrong_step(side.step, side.loss, SETTINGS) is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("self.move(eps, seed)\n        self.move(-self", "self.move(-self", "leaves the direction|the step is"),
        ("self.move(-2 * eps", "self.move(-eps", "standard deviation"),
        ("-2 * eps, seed", "-2 * eps, seed + 1", "standard deviation|not evaluated at"),
        ("-self.config.lr", "self.config.lr", "the step is"),
        ("-self.config.lr", "-2 * self.config.lr", "the step is"),
        ("-self.config.lr", "float('nan')", "become NaN"),
        ("torch.randn(p.shape, generator=generator)", "torch.rand(p.shape, generator=generator)", "has a mean of"),
        ("for p in self.params:", "for p in self.params[1:]:", "is not perturbed"),
        ("below = self.inner_zo_forward().item()", "below = 0.0", "evaluates the loss 1 times"),
        ("below = self.inner_zo_forward()", "below = (self.inner_zo_forward() * 0 + above)", "the step is"),
    ],
)
def test_a_step_that_is_not_of_spsa_is_wrong(checkout, old, new, said):
    with pytest.raises(AssertionError, match=said):
        assert wrong("zo2", checkout(old, new)) is None


def exact(checkout, old="", new=""):
    (row,) = measure(spec("exact", "zo2", checkout(old, new)))
    return row


def test_what_is_told_of_a_peer_that_keeps_its_promises(checkout):
    row = exact(checkout)
    assert row["correct"]
    promises = ("same_seed_same_bits", "other_seed_other_bits", "seed_0_works", "noise_differs")
    assert all(row[name] is True for name in promises)
    assert not row["restored_bits"] and 0 < row["restored_relative_rms"] < 1e-6


def test_memory_is_told_to_the_byte(checkout):
    (row,) = measure(spec("memory", "zo2", checkout()))
    assert row["correct"] and row["ours_extra_memory_mib"] > 0
    largest = 512 * 32 * 4 / 2**20  # the table of positions: its noise, and that times a number
    assert largest <= row["extra_memory_mib"] <= 3 * largest


def test_noise_that_does_not_repeat_is_told(checkout):
    row = exact(checkout, "zo_random_seed\n", "torch.randint(2**31, ()).item()\n")
    assert row["correct"] and row["same_seed_same_bits"] is False and row["seed_0_works"] is False
    assert "does not repeat" in cases.cells(row | {"experiment": "exact"})["its noise"]


def test_a_seed_0_that_is_dropped_is_told(checkout):
    row = exact(checkout, "zo_random_seed\n", "zo_random_seed or torch.randint(2**31, ()).item()\n")
    assert row["same_seed_same_bits"] is True and row["seed_0_works"] is False
    assert "seed 0" in cases.cells(row | {"experiment": "exact"})["its noise"]


def test_a_seed_that_is_ignored_is_told(checkout):
    row = exact(checkout, "zo_random_seed\n", "7\n")
    assert row["same_seed_same_bits"] is True and row["other_seed_other_bits"] is False


def test_equal_noise_for_equal_shapes_is_told(checkout):
    row = exact(checkout, "            p +=", "            generator.manual_seed(seed)\n            p +=")
    assert row["correct"] and row["noise_differs"] is False


@pytest.mark.parametrize("peer", ["ours", "ours-in-forward"])
def test_ours_keeps_all_promises(peer):
    (row,) = measure(spec("exact", peer))
    assert row["correct"] is True
    assert row["restored_bits"] is (peer == "ours-in-forward")


def test_times_stand_beside_ours_and_losses_fall():
    (row,) = measure(spec("time", "published"))
    assert row["correct"] and row["ratio_p10"] <= row["ratio"] <= row["ratio_p90"] and row["samples"] >= 2
    for who in ("", "baseline_"):
        assert 0 < row[f"{who}forwards_seconds_median"] < row[f"{who}seconds_median"]
    (row,) = measure(spec("loss", "published", steps=5))
    assert row["correct"] and row["runs"] == 2 and row["loss_after_largest"] < row["loss_before"]


def test_code_that_fails_or_is_not_there_is_skipped_by_its_reason(checkout, tmp_path):
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):  # the runner says that it is not installed
        measure(spec("time", "zo2", checkout("import torch\n", "import no_such_module\n")))
    with pytest.raises(Unavailable, match=r"there is no file trainer\.py"):
        measure(spec("exact", "mezo", str(tmp_path)))
    with pytest.raises(Unavailable, match="there is no package zo2"):
        spec("exact", "zo2", str(tmp_path / "config")).load()


def test_a_step_that_raises_is_skipped_by_its_reason(checkout):
    with pytest.raises(Unavailable, match="zo2 fails here by "):
        measure(spec("time", "zo2", checkout("self.move(eps, seed)", "torch.cuda.Stream(); self.move(eps)")))


def test_methods_are_taken_from_a_file_that_cannot_be_imported(tmp_path):
    file = tmp_path / "trainer.py"
    file.write_text("import no_such\nclass A(no_such.B):\n    def f(self):\n        return n\n    def g(self): ...\n")
    made = methods(file, "A", ["f"], {"n": 3})
    assert made().f() == 3 and not hasattr(made, "g")
    for of, name in (("C", "f"), ("A", "h")):
        with pytest.raises(Unavailable, match=rf"\b{of if of == 'C' else name}\b"):
            methods(file, of, [name], {})


def test_the_command_writes_rows_and_says_what_is_missing(tmp_path):
    file = tmp_path / "rows.json"
    only = "published/exact|mezo/exact"
    given = ["peers", "--shape", "tiny", "--batch", "2", "--tokens", "4", "--threads", "1", "--only", only]
    assert main([*given, "--json", str(file)]) == 0
    found = {row["peer"]: row for row in json.loads(file.read_text())}
    assert len(list(csv.DictReader(file.with_suffix(".csv").open()))) == 2
    assert found["published"]["correct"] is True and found["published"]["peer_how"]
    assert "--mezo PATH" in found["mezo"]["skipped"]
    assert not any(isinstance(value, (dict, list)) for row in found.values() for value in row.values())


def test_a_checkout_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["peers", "--list", "--zo2", str(tmp_path / "none")])
    assert f"there is no {tmp_path / 'none'}" in capsys.readouterr().err


def test_every_adapter_has_its_cases_and_its_option():
    options = parser().parse_args(["peers"])
    names = {case.name for case in cases.cases(options)}
    assert {f"opt-125m/{peer}/loss" for peer in PEERS} <= names and "opt-125m/ours/time" not in names
    assert all(peer in PEERS and hasattr(options, peer.replace("-", "_")) for peer in CHECKOUTS)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_figure_shows_what_was_measured(threads):
    from matplotlib.figure import Figure

    machine = {
        "shape": "opt-125m",
        "batch": 1,
        "tokens": 32,
        "threads": threads,
        "elements": 10**8,
        "device_name": "CPU",
    }
    known = {**machine, "correct": True}
    told, other = ("cpu_", "") if threads == 1 else ("", "cpu_")  # with one thread other load shows in the clock alone
    time = {"experiment": "time", "baseline": "Other", f"{told}ratio": 4.5, f"{other}ratio": 9.0}
    for who, seconds in (("", 1.0), ("baseline_", 4.0)):
        time |= {f"{who}{told}seconds_median": seconds, f"{who}{other}seconds_median": 2 * seconds}
        time |= {f"{who}forwards_share": 0.25}
    rows = [known | time | {"peer": "other"}, known | time | {"peer": "memory unknown"}]
    memory = [
        known | {"experiment": "memory", "peer": p, "extra_memory_mib": m} for p, m in (("ours", 0.3), ("other", 99))
    ]
    chosen = figure.choose([*rows, *memory])
    assert [(bar["peer"], bar["ms"], bar["ratio"], bar["extra_mib"]) for bar in chosen] == [
        ("zo_kernels", 1000.0, 1.0, 0.3),
        ("Other", 4500.0, 4.5, 99),
    ]
    assert figure.choose(rows) == []
    drawn = Figure(figsize=(9, 5.5))
    figure.draw(drawn, chosen)
    said = [text.get_text() for axes in drawn.axes for text in axes.texts]
    assert sorted(said) == sorted(["1,000 ms", "0.3", "4,500 ms   4.5×", "99"])
