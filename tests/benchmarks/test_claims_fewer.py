"""Forwards to a loss, windows of rates, the second implementation of steps, prompts, masks, first order."""

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
from benchmarks.claims import tasks
from benchmarks.claims.arms import EPS
from benchmarks.claims.fewer import cases, figure, first_order, masks, prompts
from benchmarks.claims.fewer.arms import forwards_arm, momentum_arm, twin, unlike
from benchmarks.claims.fewer.study import Equal, gains, studies, widened, width, window
from benchmarks.claims.fewer.twin import Kind
from benchmarks.claims.learning import Arm
from zo_kernels.estimators.draws import direction_seeds

CPU = torch.device("cpu")
TRIED = {1.0: 3.0, 2.0: 1.2, 4.0: 1.0, 8.0: 1.6, 16.0: math.inf}  # from 5: gains of .5, .95, 1, .85, 0


def options_of(*more):
    return parser().parse_args(["claims", "--fast", "--device", "cpu", "--seeds", "0", "1", "--threads", "1", *more])


@pytest.fixture(scope="module")
def task():
    return tasks.LanguageTask(True, "fast", CPU, 8)


def test_gains_are_parts_of_the_best_one_s():
    assert list(gains(TRIED, 5.0).values()) == pytest.approx([0.5, 0.95, 1.0, 0.85, 0.0])
    assert set(gains(TRIED, 0.5).values()) == {0.0}


def test_a_window_has_the_rates_near_the_best_without_a_gap():
    assert window(TRIED, 5.0) == [2.0, 4.0]
    assert window({**TRIED, 0.5: 1.0}, 5.0) == [0.5] and window({**TRIED, 0.5: 1.0 + 1e-9}, 5.0) == [2.0, 4.0]
    assert window(TRIED, 1.0) == []


def test_a_window_is_interpolated_over_the_logarithm():
    low, high = (0.95 - 0.9) / (0.95 - 0.5), (1 - 0.9) / (1 - 0.85)
    assert width(TRIED, 5.0) == pytest.approx(2 * 2 ** (low + high))
    assert width({2.0: 1.2, 4.0: 1.0, 8.0: 1.6}, 5.0) is None


def test_a_grid_grows_until_both_ends_are_outside_the_window():
    def loss_of(lr):
        return 1.0 + 0.04 * math.log2(lr / 32) ** 2

    best, tried = widened(loss_of, 8.0, 3.0)
    near = window(tried, 3.0)
    assert best == 32.0 and near == [8.0, 16.0, 32.0, 64.0, 128.0] and list(tried) == [4.0, *near, 256.0]


class Line:
    """A task whose dev loss is the model's one weight."""

    def model(self, seed, dtype=torch.float32):
        model = nn.Module()
        model.x = nn.Parameter(torch.tensor(4.0))
        return model

    def closures(self, model, seed):
        while True:
            yield lambda: model.x

    def dev_loss(self, model, seed):
        return model.x.item()

    def test(self, model, seed):
        return {"test_loss": model.x.item()}


def test_arms_are_compared_at_equal_forwards():
    """Two arms with the same steps: that of four forwards takes half as many, and twice the forwards to their loss."""
    taken = []

    class Descent:
        def __init__(self, model, lr, seed):
            self.model, self.name = model, len(taken)
            taken.append(0)

        @torch.no_grad()
        def step(self, closure):
            taken[self.name] += 1
            self.model.x -= 0.01

    cheap, dear = (Arm(str(n), Descent, lambda *_: None, forwards=n) for n in (2, 4))
    study = Equal(Line, 100, [0, 1], 1.0)
    row = study.rows(dear, cheap)[-1]
    assert set(taken) <= {0, 50, 100} and row["steps"] == 50 and row["forwards"] == 200
    assert row["forwards_ratio"] == pytest.approx(2.0, rel=1e-3) and row["forwards_verdict"] == "refuted"
    assert row["runs_as_low"] == 0 and study.rows(cheap, dear)[-1]["runs_as_low"] == 2
    back = study.rows(cheap, dear)[-1]
    assert back["forwards_ratio"] == pytest.approx(0.5, rel=1e-3) and back["forwards_verdict"] == "reproduced"
    assert back["forwards_third_verdict"] == "refuted"
    assert back["steps"] == 100 and len(study.result(cheap).curves[0].losses) == 11
    assert study.result(cheap).curves[0].steps[:4] == (0, 1, 4, 9)


KINDS = [
    Kind(),
    Kind(3, distribution="rademacher"),
    Kind(3, True),
    Kind(3, True, "std", "rademacher"),
    Kind(2, normalize="std"),
    Kind(normalize="rms", beta=0.9),
    Kind(2, True, "rms", "rademacher"),
]


def checked(arm, task, *, frozen=False):
    model = task.model(0)
    model.token.requires_grad_(not frozen)
    return arm.wrong(arm.make(model, 1e-3, 0), model, next(task.closures(model, 0)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.directions}-{kind.one_sided}-{kind.normalize}")
def test_the_library_s_steps_are_the_twin_s(kind, task):
    arm = forwards_arm("it", options_of(), kind, 2.0)
    assert checked(arm, task) is None and checked(arm, task, frozen=True) is None
    assert arm.forwards == (kind.directions + 1 if kind.one_sided else 2 * kind.directions)
    other = replace(kind, normalize="none" if kind.normalize != "none" else "rms")
    of_other = forwards_arm("it", options_of(), other).make
    wrong = replace(arm, wrong=lambda *of: arm.wrong.func(of_other, twin(kind, options_of()), *of))
    assert "are not those of its twin" in checked(wrong, task)


def test_momentum_replays_the_last_steps(task):
    kind, lr, seed = Kind(momentum=(0.5, 2)), 1e-2, 3
    assert checked(momentum_arm("it", options_of(), kind), task) is None
    model, expected = task.model(0), task.model(0)
    optimizer, plain = twin(kind, options_of())(model, lr, seed), twin(Kind(), options_of())(model, 0.0, seed)
    slopes = []
    for step in range(3):
        closure = next(task.closures(model, step))
        with torch.no_grad():
            start = [p.clone() for p in model.parameters()]
            (z,) = direction_seeds(seed, step, 1)
            losses = []
            for scale in (EPS, -EPS):
                zo.add_noise_(plain.params, z, scale, **plain._options)
                losses.append(closure().item())
                torch._foreach_copy_(list(model.parameters()), start)
            slopes = [(z, (losses[0] - losses[1]) / (2 * EPS)), *slopes][:2]
            for at, (each, g) in enumerate(slopes):
                zo.add_noise_(list(expected.parameters()), each, -lr * 0.5**at * g, **plain._options)
        optimizer.step(closure)
    # Walks round; momentum of one step more or less would be off by lr.
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-4)


def test_prompts_ask_for_texts_that_were_not_pretrained_on():
    known, new = prompts._texts("asyncio/*.py")
    assert len(new[0]) == len(new[1]) > 5 and not {t for of in known for t in of} & {t for of in new for t in of}
    task = prompts.PromptsTask("fast", CPU)
    dev, test, training = task._splits(0)
    rows = [{tuple(row) for prompt in part.prompts for row in prompt.rows} for part in (dev, test, training)]
    assert not rows[0] & rows[1] and not (rows[0] | rows[1]) & rows[2]
    first = training.prompts[0]
    texts = [bytes(row).decode() for row in first.rows]
    assert texts == [bytes(first.prompt).decode() + word for word in ("class", "def")] and " = " in texts[0]
    assert [len(row) - len(first.prompt) for row in first.rows] == first.answers
    model = task.model(0)
    batch = training.batch([0, 1])
    scores = prompts._scores(model, batch)
    for at, prompt in enumerate(training.prompts[:2]):
        for candidate, row in enumerate(prompt.rows):
            logits = model(torch.tensor([row]), None).logits[0].log_softmax(-1)
            places = range(len(prompt.prompt), len(row))
            wanted = sum(logits[i - 1, row[i]] for i in places) / len(places)
            assert scores[at, candidate].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_weights_that_grow_out_of_a_mask_are_counted(task):
    watched, model = masks.Watched(task), task.model(0)
    assert watched.test(model, 0)["left_mask"] == 0.0
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e6)  # all but those that are 0
    assert watched.test(model, 0)["left_mask"] > 0.9


def test_the_library_s_masks_are_the_ablation_s(task):
    by_redrawn = masks.arms(options_of())
    assert [checked(arm, task) for arm in by_redrawn.values()] == [None, None]
    either = partial(unlike, by_redrawn[True].make, by_redrawn[False].make)
    assert "are not those of its twin" in checked(replace(by_redrawn[True], wrong=either), task)


def test_adapters_change_nothing_before_they_learn(task):
    model, ids = task.model(0), torch.arange(8)[None]
    logits, weights = model(ids), {name: p.detach().clone() for name, p in model.named_parameters()}
    arm = first_order.first_order("LoRA", adapters=True, guess=1.0)
    steps = arm.make(model, 1e-2, 0)
    assert torch.equal(model(ids), logits)
    assert sum(p.numel() for p in steps.params) == 4 * 8 * (8 + 24 + 8 + 8 + 8 + 32 + 32 + 8)
    for _ in range(2):
        steps.step(next(task.closures(model, 0)))
    assert not torch.equal(model(ids), logits)
    known = dict(model.named_parameters())
    assert all(
        torch.equal(
            known[
                name if name in known else name.replace(".weight", ".linear.weight").replace(".bias", ".linear.bias")
            ],
            p,
        )
        for name, p in weights.items()
    )


@pytest.mark.parametrize("adapters", [False, True])
def test_a_wrong_first_step_of_adamw_is_noticed(adapters, task, monkeypatch):
    arm = first_order.first_order("it", adapters=adapters, guess=1.0)
    assert checked(arm, task) is None
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (step(self), step(self)))
    assert "not AdamW's" in checked(arm, task)


def test_a_wrong_arm_is_not_run(task):
    study = Equal(lambda: task, 2, [0], 1e-3)
    arm = replace(forwards_arm("it", options_of(), Kind()), wrong=lambda *_: "off")
    with pytest.raises(Wrong, match="it: off"):
        study.result(arm)


def test_cases_are_named_once_and_trec_needs_its_folder(monkeypatch):
    options = parser().parse_args(["claims", "--device", "cpu"])
    found = list(cases.cases(options))
    assert len({case.name for case in found}) == len(found)
    assert "--trec PATH" in next(case for case in found if "/trec/" in case.name).reason_to_skip()
    assert set(studies(options)) == {case.facts["task"] for case in found}


@pytest.mark.parametrize(
    "only, columns",
    [
        ("^fewer/first-order/capitals/LoRA", ("forwards_ratio", "step_time_ratio", "memory_mib", "trained")),
        ("^fewer/auto/small-letters/MeZO", ("loss_ratio", "forwards_price_share", "grid_lr")),
        ("^fewer/masks/capitals", ("left_mask", "dev_loss")),
    ],
)
def test_claims_run(only, columns, tmp_path, monkeypatch):
    monkeypatch.setattr(Equal, "grid", lambda self, arm: (1e-3, {5e-4: 9.0, 1e-3: self.start - 1, 2e-3: 9.0}))
    monkeypatch.setattr(masks, "PARTS", masks.PARTS[:2])
    file = tmp_path / "rows.json"
    arguments = ["--fast", "--device", "cpu", "--threads", "1", "--seeds", "0", "1", "--steps", "2"]
    assert main(["claims", "--only", only, *arguments, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert all(row["correct"] is True and row["claim"] == "fewer" for row in found)
    for column in columns:
        assert isinstance(found[-1][column], float | int), column


def test_losses_are_drawn_over_forwards(tmp_path):
    file = tmp_path / "rows.json"
    row = {"case": "it", "claim": "fewer", "experiment": "forwards", "task": "line", "arm": "MeZO", "runs": 2}
    row |= {"steps": 100, "forwards_per_step": 2, "start_loss": 4.0, "dev_loss": 3.0, "dev_loss_sd": 0.1}
    row |= {f"dev_loss_{k}": 4 - k / 10 for k in range(1, 11)}
    other = row | {"experiment": "others", "arm": "momentum"}
    short = row | {"task": "plane", "steps": 5} | {f"dev_loss_{k}": None for k in range(6, 11)}  # of five points
    file.write_text(json.dumps([row, row | {"arm": "FZOO, 8"}, short, other, row | {"runs": None}]))
    assert len(figure.choose(json.loads(file.read_text()))) == 3
    assert main(["plot", str(file), "--out", str(tmp_path)]) == 0 and (tmp_path / "forwards.png").stat().st_size
