"""The claims about MeZO-SVRG at sizes at which they say nothing: what the benchmark computes, checks and refuses."""

import math
from argparse import Namespace

import pytest
import torch

from benchmarks.claims import interval
from benchmarks.claims.interval import ratio
from benchmarks.claims.svrg import compare, estimates, figure, least_squares, mlp, theory, variance
from benchmarks.claims.svrg import runs as svrg_runs
from benchmarks.claims.svrg.draws import Draws
from benchmarks.claims.svrg.methods import FULL, METHODS, MEZO, Formula, Method
from benchmarks.claims.svrg.problems import BATCH, Problem, flat, put
from benchmarks.claims.svrg.problems import least_squares as problem_of
from benchmarks.claims.svrg.runs import Stepper, runs
from benchmarks.claims.svrg.theory import covariance, mezo, svrg
from benchmarks.claims.svrg.tuning import Tuned, tune

BY_NAME = {method.name: method for method in METHODS}
OPTIONS = Namespace(
    only=None, list=False, json=None, limit=None, steps=None, seeds=[0, 1], device="cpu", threads=1, fast=True
)


@pytest.fixture
def small():
    return problem_of("cpu", n=64, d=8)


def classifier():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(48, 6, generator=generator)
    y = torch.randint(3, (48,), generator=generator)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))  # noqa: E731
    return Problem(x, y, make, lambda out, to: torch.nn.functional.cross_entropy(out, to, reduction="none"))


@pytest.mark.parametrize("make", [lambda: problem_of("cpu", n=64, d=8), classifier])
def test_losses_and_gradients_are_the_modules(make):
    problem = make()
    models = [problem.model(seed) for seed in (0, 1)]
    theta = torch.stack([flat(model) for model in models]).to(problem.x.dtype)
    losses = problem.losses(theta, problem.x, problem.y)
    for model, loss in zip(models, losses, strict=True):
        expected = problem.loss(model)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (expected).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(problem.example_gradients(model).mean(0).float(), gradient, rtol=1e-4, atol=1e-5)


def test_runs_near_the_optimum_start_there():
    problem = problem_of("cpu", 1.0, near=True, n=400, d=20)
    starts = [flat(problem.model(seed)) for seed in (0, 1)]
    assert not torch.equal(*starts)
    excess = [problem.losses(start, problem.x, problem.y).item() - problem.floor for start in starts]
    assert all(0 < e < 0.1 * problem.floor for e in excess)


def test_the_variance_of_spsa_is_what_the_law_of_total_variance_says(monkeypatch):
    """Against many estimates in float64, of gradients made up: nothing of the library takes part."""
    monkeypatch.setattr(theory, "BATCH", 4)
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
        assert abs(squares.mean().item() - expected.total) < 4 * error


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
        patch.setattr(theory, "BATCH", 4)
        expected = theory.worth(here)
    assert expected > 2
    assert most(g) / most(here[batches].mean(1)) == pytest.approx(expected, rel=0.06)


def test_a_period_costs_what_its_steps_do(small):
    method = BY_NAME["svrg-q5"]
    queries = sum(method.queries(step, small) for step in range(5))
    assert theory.cost(small.examples, 5) == queries / MEZO.queries(0, small)


def test_a_full_batch_has_no_covariance_and_a_small_one_that_of_its_mean():
    a = torch.randn(BATCH, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert covariance(a, a) == 0.0
    b = torch.randn(5000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = torch.stack(
        [b[torch.randperm(5000, generator=torch.Generator().manual_seed(i))[:BATCH]].mean(0) for i in range(4000)]
    )
    assert covariance(b, b) == pytest.approx(drawn.var(0).sum().item(), rel=0.06)


@pytest.mark.parametrize("name", [method.name for method in METHODS if method.ours])
@pytest.mark.parametrize("make", [lambda: problem_of("cpu", n=64, d=8), classifier])
def test_the_optimizers_end_where_the_formulas_do(name, make):
    problem, method = make(), BY_NAME[name]
    svrg_method = bool(method.anchor_every)
    found = runs(problem, method, Tuned(5e-3, 1e-2 if svrg_method else None), Draws(problem, (0, 7)), 12)
    assert [run.wrong for run in found] == [None, None]
    assert found[0].queries == sum(method.queries(step, problem) for step in range(12))


def test_an_optimizer_that_does_something_else_is_noticed(small, monkeypatch):
    method = BY_NAME["svrg-q2"]
    make = svrg_runs.optimizer
    wrong = Method("svrg-q2", 2, "separate")
    monkeypatch.setattr(svrg_runs, "optimizer", lambda model, method, *rest: make(model, wrong, *rest))
    (run,) = runs(small, method, Tuned(2e-2, 1e-2), Draws(small, (0,)), 12)
    assert "of the way off the formula" in run.wrong


def test_with_the_published_anchor_the_correction_is_noise_without_drift(small):
    """Its two estimates are at the same weights, drawn apart: their difference has the mean 0, and both variances."""
    draws = Draws(small, tuple(range(400)))
    formula = Formula(BY_NAME["published-q2"], draws, torch.tensor([[1.0, 0.0]]))
    formula.theta = formula.theta[:1].expand(400, -1, -1).clone()  # one start for all
    formula.step()
    start, own = formula.theta, formula._g
    formula.step()
    correction = (start - formula.theta - own)[:, 0]
    stepper = Stepper(small, MEZO, 0, 0.0, None)
    put(stepper.model, start[0, 0])
    here = small.example_gradients(stepper.model)
    d, unit = small.dimension, here.mean(0).square().sum().item()
    variance = 2 * (d + 2) * (unit + covariance(here, here)) - 2 * (unit + covariance(here, here))
    assert correction.square().sum(1).mean().item() == pytest.approx(variance, rel=0.3)
    assert correction.mean(0).norm().item() < 4 * math.sqrt(variance / 400)


@pytest.mark.parametrize("directions", ["shared", "separate"])
def test_the_estimates_measured_are_those_of_the_steps(small, directions):
    shared, rate = directions == "shared", 1e-2
    stepper = Stepper(small, Method("svrg", 100, directions), 3, rate, rate)
    start = flat(stepper.model)
    stepper.step()
    anchored = flat(stepper.model)
    own = (start - anchored) / rate
    for estimate in estimates._estimates(stepper, 3, shared):
        after = flat(stepper.model)
        torch.testing.assert_close((anchored - after) / rate, own + estimate, rtol=1e-3, atol=1e-2)
        anchored = after


def test_queries_count_example_forwards(small):
    n = small.examples
    assert [MEZO.queries(t, small) for t in (0, 1)] == [2 * BATCH] * 2
    assert FULL.queries(1, small) == 2 * n
    assert [BY_NAME["svrg-q2"].queries(t, small) for t in range(4)] == [2 * n, 4 * BATCH] * 2
    assert BY_NAME["sgd"].queries(0, small) == BATCH
    assert MEZO.steps_for(10 * BATCH, small) == 5
    assert BY_NAME["svrg-q2"].steps_for(4 * n + 8 * BATCH, small) == 4
    assert FULL.steps_for(1, small) == 1


def test_tuning_finds_rates_inside_of_its_grid_and_leaves_those_that_diverge(small):
    tuned = tune(FULL, Draws(small, (1000, 1001)), 30)
    assert not tuned.at_edge and tuned.anchor_lr is None and tuned.loss_of_anchors_alone is None
    formula = Formula(FULL, Draws(small, (1000, 1001)), torch.tensor([[tuned.lr * f, 0.0] for f in (0.5, 1, 2)]))
    for _ in range(30):
        formula.step()
    below, best, above = (formula.loss() - small.floor).mean(0).tolist()
    assert best == pytest.approx(tuned.loss) and best < below and not best >= above
    svrg_tuned = tune(BY_NAME["svrg-q2"], Draws(small, (1000,)), 10)
    assert svrg_tuned.anchor_lr > 0 and svrg_tuned.loss <= svrg_tuned.loss_of_anchors_alone


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([1, 2.1, 2.9], "reproduced"), ([20, 42, 61], "refuted"), ([1, 21, 30], "undecided")],
)
def test_a_verdict_is_that_of_the_interval(values, verdict):
    row = ratio(values, [10, 20, 30], "to_mezo")
    assert row["to_mezo_verdict"] == verdict
    assert row["to_mezo_ratio_low"] < row["to_mezo_ratio"] < row["to_mezo_ratio_high"]


def test_intervals_are_students_and_need_two_seeds():
    from scipy import stats

    for i, t in enumerate(interval._T, 1):
        assert t == pytest.approx(stats.t.ppf(0.975, i), abs=6e-4)
    assert ratio([1.0], [2.0], "x") == {"x_ratio": 0.5, "x_ratio_low": None, "x_ratio_high": None, "x_verdict": None}
    assert set(ratio([1.0, math.inf], [2.0, 2.0], "x").values()) == {None}


def test_rows_of_a_comparison(monkeypatch):
    found = list(least_squares.cases(OPTIONS))
    assert len({case.name for case in found}) == len(found) == 2 * len(METHODS)
    chosen = [case for case in found if case.name == "svrg-least-squares/far/svrg-q2"]
    monkeypatch.setattr(
        compare, "tune", lambda method, draws, steps: Tuned(1e-3, 2e-3 if method.anchor_every else None)
    )
    (case,) = chosen
    rows = [{**case.facts, **row} for row in case.measure()]
    assert {row["budget"] for row in rows} == {"steps", "queries", "time", "steps, published rates"}
    assert all(row["correct"] and not any(isinstance(v, (list, dict)) for v in row.values()) for row in rows)
    means = [row for row in rows if row["run_seed"] is None]
    assert len(rows) == 3 * len(means) and all(row["runs"] == 2 for row in means)
    for mean in means:
        losses = [row["loss"] for row in rows if row["budget"] == mean["budget"] and row["run_seed"] is not None]
        assert mean["loss"] == pytest.approx(sum(losses) / 2) and mean["to_mezo_verdict"] in interval.VERDICTS
        assert "mean of 2" in compare.cells(mean)["seed"]
    by = {row["budget"]: row for row in means}
    assert by["steps"]["loss_10"] == by["steps"]["loss"] and by["steps"]["queries_10"] == by["steps"]["queries"]
    assert by["queries"]["queries"] <= sum(BY_NAME["svrg-q10"].queries(t, problem_of("cpu")) for t in range(20))
    assert len(figure.choose(means)) == 1


def test_rates_at_the_edge_of_their_grid_are_wrong(monkeypatch):
    (case,) = [
        case for case in least_squares.cases(OPTIONS) if case.name == "svrg-least-squares/near-optimum/mezo-full-batch"
    ]
    monkeypatch.setattr(compare, "tune", lambda *_: Tuned(1e-3, None, at_edge=True))
    rows = case.measure()
    assert all(row["correct"] is False and "at the edge" in row["wrong"] for row in rows)


def test_rows_of_variances_agree_with_theory_and_are_refused_if_not(monkeypatch):
    options = Namespace(**{**vars(OPTIONS), "seeds": [0, 1, 2]})
    (case,) = [case for case in variance.cases(options) if case.name == "svrg-variance/near-optimum/start"]
    monkeypatch.setattr(variance, "_AGES", {2: 1})
    rows = [{**case.facts, **row} for row in case.measure()]
    means = {row["directions"]: row for row in rows if row["run_seed"] is None}
    assert set(means) == {"shared", "separate"} and all(row["correct"] for row in rows)
    for row in rows:
        assert row["variance"] == pytest.approx(row["direction"] + row["minibatch"] + row["anchor"])
    assert means["shared"]["expected_ratio"] < 0.1 < 1 < means["separate"]["expected_ratio"]
    assert means["shared"]["to_mezo_verdict"] == "reproduced"
    assert means["shared"]["pays_in_steps"] is True
    assert means["shared"]["pays_in_queries"] is (means["shared"]["full_batch_worth"] > means["shared"]["period_cost"])
    assert "reproduced" in variance.cells(means["shared"])["÷ MeZO's"]
    assert len(figure.choose([row | {"anchor_every": 5} for row in rows])) == 2
    monkeypatch.setattr(variance.theory, "mezo", lambda here: svrg(here, here, "separate"))
    wrong = case.measure()
    assert all(row["correct"] is False and "standard errors" in row["wrong"] for row in wrong)


def test_without_scikit_learn_the_classifier_is_skipped(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert {case.skipped for case in mlp.cases(OPTIONS)} == {"scikit-learn is not installed"}
    skipped = [case.name for case in variance.cases(OPTIONS) if case.skipped]
    assert skipped == ["svrg-variance/mlp/start", "svrg-variance/mlp/late"]


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
