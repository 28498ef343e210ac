"""The claims about MeZO-SVRG at sizes at which they say nothing: what the benchmark computes, checks and refuses."""

import math
from argparse import Namespace

import pytest
import torch

import zo_kernels as zo
from benchmarks.bench.registry import Wrong
from benchmarks.claims.cases import cells
from benchmarks.claims.intervals import VERDICTS, ratio
from benchmarks.claims.svrg import figure, methods, training, variance
from benchmarks.claims.svrg.methods import EVERY, METHODS, MEZO, Method, Stepper, wrong
from benchmarks.claims.svrg.problems import BATCH, Problem, flat, least_squares
from benchmarks.claims.svrg.training import run, tune
from benchmarks.claims.svrg.variance import covariance, estimates, mezo, square, svrg, worth

FULL = METHODS[1]
BY_NAME = {method.name: method for method in METHODS}
OPTIONS = Namespace(
    only=None, list=False, json=None, limit=None, steps=None, seeds=[0, 1], device="cpu", threads=1, fast=True
)


@pytest.fixture
def small():
    return least_squares("cpu", n=64, d=8)


def classifier():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(48, 6, generator=generator)
    y = torch.randint(3, (48,), generator=generator)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))  # noqa: E731
    return Problem(x, y, make, lambda out, to: torch.nn.functional.cross_entropy(out, to, reduction="none"))


@pytest.mark.parametrize("make", [lambda: least_squares("cpu", n=64, d=8), classifier])
def test_losses_and_gradients_are_the_modules(make):
    problem = make()
    model = problem.model(1)
    gradients = problem.example_gradients(flat(model))  # before anything else has run
    loss = problem.loss(model, EVERY)
    assert problem.excess(model) + problem.floor == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradients.mean(0).float(), gradient, rtol=1e-4, atol=1e-5)


def test_runs_near_the_optimum_start_there():
    problem = least_squares("cpu", 1.0, near=True, n=400, d=20)
    models = [problem.model(seed) for seed in (0, 1)]
    assert not torch.equal(*map(flat, models))
    assert all(0 < problem.excess(model) < 0.1 * problem.floor for model in models)


def test_the_variance_of_spsa_is_what_the_law_of_total_variance_says(monkeypatch):
    """Against many estimates in float64, of gradients made up: nothing of the library takes part."""
    monkeypatch.setattr(variance, "BATCH", 4)
    generator = torch.Generator().manual_seed(0)
    n, d, draws = 40, 3, 100_000
    here = torch.randn(n, d, dtype=torch.float64, generator=generator) + 0.5
    there = here + 0.3 * torch.randn(n, d, dtype=torch.float64, generator=generator)
    batches = torch.rand(draws, n, generator=generator).argsort(1)[:, :4]
    z, other, own = torch.randn(3, draws, d, dtype=torch.float64, generator=generator)

    def estimate(gradients, z):
        return (gradients * z).sum(-1, keepdim=True) * z

    a, b = here[batches].mean(1), there[batches].mean(1)
    anchor = estimate(there.mean(0), own)
    for drawn, expected in (
        (estimate(a, z), mezo(here)),
        (estimate(a, z) - estimate(b, z) + anchor, svrg(here, there, "shared")),
        (estimate(a, z) - estimate(b, other) + anchor, svrg(here, there, "separate")),
    ):
        squares = (drawn - here.mean(0)).square().sum(1)
        error = squares.std().item() / math.sqrt(draws)
        assert abs(squares.mean().item() - sum(expected)) < 4 * error
    # The published code's anchor is a second name for the weights: its correction has the mean 0, and both variances.
    drawn = estimate(a, z) - estimate(a, other)
    twice = 2 * (d + 1) * (square(here) + covariance(here, here))
    assert drawn.square().sum(1).mean().item() == pytest.approx(twice, rel=0.05)
    assert drawn.mean(0).norm().item() < 4 * math.sqrt(twice / draws)


def test_a_full_batch_is_worth_the_steps_that_its_smaller_variance_allows():
    """On a quadratic with equal curvature: the most that one step lowers it, over all learning rates."""
    generator = torch.Generator().manual_seed(0)
    n, d, draws = 40, 4, 100_000
    here = torch.randn(n, d, dtype=torch.float64, generator=generator) + 0.3
    g = here.mean(0)
    z = torch.randn(draws, d, dtype=torch.float64, generator=generator)
    batches = torch.rand(draws, n, generator=generator).argsort(1)[:, :4]

    def most(gradients):
        estimates = (gradients * z).sum(1, keepdim=True) * z
        return (g.square().sum() ** 2 / (2 * estimates.square().sum(1).mean())).item()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variance, "BATCH", 4)
        expected = worth(here)
    assert expected > 2
    assert most(g) / most(here[batches].mean(1)) == pytest.approx(expected, rel=0.06)


def test_a_full_batch_has_no_covariance_and_a_small_one_that_of_its_mean():
    a = torch.randn(BATCH, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert covariance(a, a) == 0.0
    b = torch.randn(5000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = torch.stack(
        [b[torch.randperm(5000, generator=torch.Generator().manual_seed(i))[:BATCH]].mean(0) for i in range(4000)]
    )
    assert covariance(b, b) == pytest.approx(drawn.var(0).sum().item(), rel=0.06)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("make", [lambda: least_squares("cpu", n=64, d=8), classifier])
def test_the_optimizers_take_the_steps_of_the_formulas_and_the_losses_that_are_counted(method, make):
    problem = make()
    assert wrong(problem, method) is None
    losses = run(problem, method, 7, 5e-3, 1e-2, 12)
    assert len(losses) == 10 and all(map(math.isfinite, losses))


def test_an_optimizer_that_does_something_else_is_noticed(small, monkeypatch):
    step = zo.MeZOSVRG.step

    def off(optimizer, *closures):
        (group,) = optimizer.param_groups
        group["lr"] *= 1.01
        loss = step(optimizer, *closures)
        group["lr"] /= 1.01
        return loss

    monkeypatch.setattr(zo.MeZOSVRG, "step", off)
    assert "weights looked at are off" in wrong(small, BY_NAME["svrg-q2"])
    monkeypatch.setattr(training, "tune", given(at_edge=False))
    with pytest.raises(Wrong, match=r"^svrg-q2: "):
        training.Comparison(OPTIONS, lambda: small, 20).rows(BY_NAME["svrg-q2"])


def test_a_run_that_asks_for_other_losses_is_noticed(small, monkeypatch):
    monkeypatch.setattr(methods.Method, "queries", lambda *_: 1)
    with pytest.raises(Wrong, match="example-forwards, not 1"):
        run(small, MEZO, 0, 1e-3, None, 12)


def test_a_run_that_diverges_ends_at_infinity(small):
    losses = run(small, MEZO, 0, 1e30, None, 40)
    assert losses[-1] == math.inf and len(losses) == 10


@pytest.mark.parametrize("directions", ["shared", "separate"])
def test_the_estimates_measured_are_those_of_the_steps(small, directions):
    rate = 1e-2
    stepper = Stepper(small, Method("svrg", 100, directions), 3, rate, rate)
    start = flat(stepper.model)
    stepper.steps(1)
    anchored = flat(stepper.model)
    own = (start - anchored) / rate
    for estimate in estimates(stepper, 3, directions):
        after = flat(stepper.model)
        torch.testing.assert_close((anchored - after) / rate, own + estimate, rtol=1e-3, atol=1e-2)
        anchored = after


def test_queries_count_example_forwards(small):
    n = len(small.x)
    assert [method.queries(2, small) for method in (MEZO, FULL)] == [4 * BATCH, 4 * n]
    assert [BY_NAME["svrg-q2"].queries(t, small) for t in range(5)] == [
        0, 2 * n, 2 * n + 4 * BATCH, 4 * n + 4 * BATCH, 4 * n + 8 * BATCH
    ]  # fmt: skip
    assert MEZO.steps_for(10 * BATCH, small) == 5 and FULL.steps_for(1, small) == 1
    assert BY_NAME["svrg-q2"].steps_for(4 * n + 8 * BATCH, small) == 4


def test_tuning_finds_rates_inside_of_its_grid_and_leaves_those_that_diverge(small):
    tuned = tune(FULL, small, (1000, 1001), 20)
    assert not tuned["at_edge"] and tuned["anchor_lr"] is None and tuned["tuning_loss_of_anchors_alone"] is None
    ends = [[run(small, FULL, s, tuned["lr"] * f, None, 20)[-1] for s in (1000, 1001)] for f in (0.5, 1, 2)]
    below, best, above = (sum(pair) / 2 for pair in ends)
    assert best == pytest.approx(tuned["tuning_loss"]) and best < below and not best >= above
    tuned = tune(BY_NAME["svrg-q2"], small, (1000,), 10)
    assert tuned["anchor_lr"] > 0 and tuned["tuning_loss"] <= tuned["tuning_loss_of_anchors_alone"]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([1, 2.1, 2.9], "reproduced"), ([20, 42, 61], "refuted"), ([1, 21, 30], "undecided")],
)
def test_a_verdict_is_that_of_the_interval(values, verdict):
    row = ratio(values, [10, 20, 30], "to_mezo")
    assert row["to_mezo_verdict"] == verdict
    assert row["to_mezo_ratio_low"] < row["to_mezo_ratio"] < row["to_mezo_ratio_high"]


def test_intervals_are_students_and_need_two_seeds():
    row = ratio([math.exp(x) for x in (-1.0, 0.0, 1.0)], [1.0] * 3, "x")
    assert math.log(row["x_ratio_high"]) == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)  # t, two degrees of freedom
    assert ratio([1.0], [2.0], "x") == {"x_ratio": 0.5, "x_ratio_low": None, "x_ratio_high": None, "x_verdict": None}
    assert set(ratio([1.0, math.inf], [2.0, 2.0], "x").values()) == {None}


def given(at_edge):
    def tuned(method, *_):
        rates = {"lr": 1e-3, "anchor_lr": 2e-3 if method.anchor_every else None}
        return {**rates, "rates_tried": 9, "at_edge": at_edge, "tuning_loss": 1.0, "tuning_loss_of_anchors_alone": None}

    return tuned


def test_rows_of_a_comparison(monkeypatch):
    found = list(training.cases(OPTIONS))
    assert len({case.name for case in found}) == len(found) == 3 * len(METHODS)
    (case,) = [case for case in found if case.name == "svrg-least-squares/far/svrg-q2"]
    monkeypatch.setattr(training, "tune", given(at_edge=False))
    rows = [{**case.facts, **row} for row in case.measure()]
    assert {row["budget"] for row in rows} == {"steps", "queries", "time"}
    assert all(row["correct"] and not any(isinstance(v, (list, dict)) for v in row.values()) for row in rows)
    means = [row for row in rows if row["run_seed"] is None]
    assert len(rows) == 3 * len(means) and all(row["runs"] == 2 for row in means)
    for mean in means:
        losses = [row["loss"] for row in rows if row["budget"] == mean["budget"] and row["run_seed"] is not None]
        assert mean["loss"] == pytest.approx(sum(losses) / 2) and mean["to_mezo_verdict"] in VERDICTS
        assert "mean of 2" in cells(mean)["seed"]
    by = {row["budget"]: row for row in means}
    assert by["steps"]["loss_10"] == by["steps"]["loss"] and by["steps"]["queries_10"] == by["steps"]["queries"]
    assert by["queries"]["queries"] <= BY_NAME["svrg-q10"].queries(20, least_squares("cpu"))
    assert len(figure.choose(means)) == 1


def test_rates_at_the_edge_of_their_grid_are_wrong(small, monkeypatch):
    monkeypatch.setattr(training, "tune", given(at_edge=True))
    with pytest.raises(Wrong, match="at the edge"):
        training.Comparison(OPTIONS, lambda: small, 20).rows(FULL)


def test_rows_of_variances_agree_with_theory_and_are_refused_if_not(monkeypatch):
    options = Namespace(**{**vars(OPTIONS), "seeds": [0, 1, 2]})
    (case,) = [case for case in variance.cases(options) if case.name == "svrg-variance/near-optimum/start"]
    rows = [{**case.facts, **row} for row in case.measure()]
    means = {row["directions"]: row for row in rows if row["run_seed"] is None}
    assert set(means) == {"shared", "separate"} and all(row["correct"] for row in rows)
    for row in rows:
        assert row["variance"] == pytest.approx(row["direction"] + row["minibatch"] + row["anchor"])
    assert means["shared"]["expected_ratio"] < 0.1 < 1 < means["separate"]["expected_ratio"]
    assert means["shared"]["to_mezo_verdict"] == "reproduced"
    assert "reproduced" in cells(means["shared"])["verdict"]
    assert len(figure.choose(rows)) == 2
    monkeypatch.setattr(variance, "mezo", lambda here: (2 * mezo(here)[0], mezo(here)[1]))
    with pytest.raises(Wrong, match="standard errors"):
        case.measure()


def test_the_figure_is_drawn_of_what_there_is():
    matplotlib = pytest.importorskip("matplotlib.figure")
    curve = {"queries_1": 1, "loss_1": 1.0, "loss_1_sd": 0.1, "queries_2": 2, "loss_2": 0.5, "loss_2_sd": None}
    runs_row = {
        "claim": "svrg-mlp",
        "problem": "digits",
        "method": "mezo",
        "budget": "queries",
        "run_seed": None,
        "correct": True,
        **curve,
    }
    parts = dict.fromkeys(
        ("direction", "minibatch", "anchor", "mezo_direction", "mezo_minibatch", "mezo_variance"), 1.0
    )
    variance = {
        "claim": "svrg-variance",
        "place": "here",
        "anchor_every": 5,
        "run_seed": None,
        "correct": True,
        **parts,
    }
    rows = [runs_row, *(variance | {"directions": d} for d in ("shared", "separate"))]
    drawing = matplotlib.Figure()
    figure.draw(drawing, figure.choose(rows))
    assert len(drawing.axes) == 2
    assert len(drawing.axes[1].patches) == 8  # two parts of MeZO's, three of each other's
