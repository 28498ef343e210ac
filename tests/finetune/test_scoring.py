"""Scores and losses against what is computed by hand from the model's logits, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

for module in ("transformers", "datasets"):
    pytest.importorskip(module)

from tiny_tasks import MODELS, row_of  # noqa: E402

from zo_kernels.finetune.prompts import causal  # noqa: E402
from zo_kernels.finetune.prompts.language_model import load_language_model, tokens_allowed  # noqa: E402
from zo_kernels.finetune.prompts.learner import PromptLearner  # noqa: E402
from zo_kernels.finetune.prompts.predictor import Prompted  # noqa: E402
from zo_kernels.finetune.prompts.task_data import Example  # noqa: E402
from zo_kernels.finetune.tasks import TASKS  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")

WIDTH = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MODELS.items()}


def prompted(folder: Path, task: str) -> Prompted:
    model, tokenizer, kind = load_language_model(str(folder), "auto", torch.float32)
    return Prompted(model, tokenizer, task, kind, tokens_allowed(model, tokenizer, None), max_new_tokens=6)


def examples_of(task: str, count: int = WIDTH) -> list[Example]:
    """Of different lengths."""
    import random

    draw, examples = random.Random(1), []
    for number in range(count):
        row = row_of(task, draw)
        long = TASKS[task].causal.cut
        row[long] = " ".join([row[long].strip()] * (number % 3 + 1))
        references = () if TASKS[task].references is None else TASKS[task].references(row)
        examples.append(Example(TASKS[task].fields(row), TASKS[task].label(row), references))
    return examples


def learner(predictor: Prompted, examples: list[Example], over: str, objective: str = "loss") -> PromptLearner:
    texts = predictor.prepare(examples, right_only=over == "tokens" and objective != "accuracy")
    return PromptLearner(predictor, texts, texts, texts, torch.device("cpu"), over, objective, batch_size=2)


@torch.no_grad()
def by_hand(predictor: Prompted, example: Example) -> list[list[float]]:
    """The log probability of every token of each candidate, one text at a time and from all logits."""
    template, encode = predictor.template, predictor.tokenizer
    prompt = template.prompt.format(**example.fields)
    result = []
    for word in template.words:
        ids = encode(prompt + word.format(**example.fields))["input_ids"]
        first = len(encode(prompt)["input_ids"])
        logs = predictor.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        result.append([logs[at - 1, ids[at]].item() for at in range(first, len(ids))])
    return result


@pytest.mark.parametrize(("model", "task"), [("opt", "sst2"), ("opt", "copa"), ("gpt2", "cb"), ("gpt2", "squad")])
def test_causal_scores_are_mean_log_likelihoods(model: str, task: str, folders: dict[str, Path]) -> None:
    predictor, examples = prompted(folders[model], task), examples_of(task)
    sums, counts = predictor.likelihoods(predictor.prepare(examples).whole(range(WIDTH)))
    expected = [by_hand(predictor, example) for example in examples]
    assert counts.tolist() == [[len(tokens) for tokens in candidates] for candidates in expected]
    torch.testing.assert_close(sums, torch.tensor([[sum(tokens) for tokens in c] for c in expected]))


@torch.no_grad()
@pytest.mark.parametrize(("model", "task"), [("roberta", "rte"), ("bert", "sst2")])
def test_masked_scores_are_label_logits(model: str, task: str, folders: dict[str, Path]) -> None:
    predictor, examples = prompted(folders[model], task), examples_of(task)
    template, tokenizer = predictor.template, predictor.tokenizer
    scores, counts = predictor.likelihoods(predictor.prepare(examples).whole(range(WIDTH)))
    for row, example in zip(scores, examples, strict=True):
        ids = tokenizer(template.prompt.format(**example.fields, mask=tokenizer.mask_token))["input_ids"]
        logits = predictor.model(torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_token_id)]
        words = [tokenizer(" " + word, add_special_tokens=False)["input_ids"][0] for word in template.words]
        torch.testing.assert_close(row, logits[words])
    assert counts.tolist() == torch.ones_like(scores).tolist()


@torch.no_grad()
def test_losses(folders: dict[str, Path]) -> None:
    """Over candidates, on tokens, and what is evaluated; an accuracy as the objective."""
    predictor, examples = prompted(folders["opt"], "copa"), examples_of("copa")
    logs = [by_hand(predictor, example) for example in examples]
    means = torch.tensor([[sum(tokens) / len(tokens) for tokens in candidates] for candidates in logs])
    labels = torch.tensor([example.label for example in examples])
    right = [log for candidates, example in zip(logs, examples, strict=True) for log in candidates[example.label]]
    accuracy = (means.argmax(1) == labels).float().mean().item()
    expected = {
        "candidates": torch.nn.functional.cross_entropy(means, labels).item(),
        "tokens": -sum(right) / len(right),
    }
    assert 0 < accuracy < 1
    for over, loss in expected.items():
        it = learner(predictor, examples, over)
        assert it.loss(it.train.batch(range(WIDTH))).item() == pytest.approx(loss, rel=1e-5)
        measured = it.evaluate(it.dev)
        assert (measured.loss, measured.accuracy) == (pytest.approx(loss, rel=1e-5), pytest.approx(accuracy))
        it = learner(predictor, examples, over, "accuracy")
        assert it.loss(it.train.batch(range(WIDTH))).item() == pytest.approx(1 - accuracy)


def test_a_batch_for_tokens_has_the_right_candidates_alone(folders: dict[str, Path]) -> None:
    predictor, examples = prompted(folders["opt"], "copa"), examples_of("copa")
    texts = predictor.prepare(examples, right_only=True)
    assert len(texts.batch(range(WIDTH)).input_ids) == WIDTH
    assert len(texts.whole(range(WIDTH)).input_ids) == 2 * WIDTH


@pytest.mark.parametrize(("model", "task"), [("opt", "boolq"), ("gpt2", "copa"), ("roberta", "wic"), ("bert", "sst2")])
def test_scores_do_not_depend_on_the_batch(model: str, task: str, folders: dict[str, Path]) -> None:
    predictor = prompted(folders[model], task)
    texts = predictor.prepare(examples_of(task))
    with torch.no_grad():
        together = predictor.likelihoods(texts.whole([3, 1, 4, 0, 2]))[0]
        for place, index in enumerate([3, 1, 4, 0, 2]):
            torch.testing.assert_close(predictor.likelihoods(texts.whole([index]))[0][0], together[place])


def test_all_logits_give_the_same_scores(folders: dict[str, Path]) -> None:
    """Of a model that cannot leave any out."""
    predictor = prompted(folders["gpt2"], "cb")
    batch = predictor.prepare(examples_of("cb")).whole(range(WIDTH))

    class All:
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return predictor.model(input_ids=input_ids, attention_mask=attention_mask)

        __call__ = forward

    with torch.no_grad():
        for some, of_all in zip(predictor.likelihoods(batch), causal.log_likelihoods(All(), batch), strict=True):
            torch.testing.assert_close(some, of_all)


@torch.no_grad()
def greedy(predictor: Prompted, prompt: list[int]) -> str:
    """Token by token from all logits, up to a newline."""
    ids, newline = list(prompt), predictor.tokenizer("\n", add_special_tokens=False)["input_ids"]
    for _ in range(predictor.max_new_tokens):
        ids.append(int(predictor.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in (*newline, predictor.tokenizer.eos_token_id):
            break
    return predictor.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).split("\n")[0].strip()


@pytest.mark.parametrize("model", ["opt", "gpt2"])
def test_answers_are_generated_greedily_in_batches(model: str, folders: dict[str, Path]) -> None:
    predictor, examples = prompted(folders[model], "squad"), examples_of("squad")
    texts = predictor.prepare(examples)
    assert isinstance(texts, causal.CausalTexts)
    alone = [greedy(predictor, prompt.prompt) for prompt in texts.prompts]
    assert predictor.generate(texts, list(range(WIDTH))) == alone and len(set(alone)) > 1


def test_generated_answers_are_measured(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, examples = prompted(folders["opt"], "squad"), examples_of("squad")
    answers = {index: (example.references[0], "a hat", f"{example.references[0]} hat")[index % 3]
               for index, example in enumerate(examples)}  # fmt: skip
    monkeypatch.setattr(Prompted, "generate", lambda self, texts, indices: [answers[index] for index in indices])
    it = learner(predictor, examples, "tokens", "f1")
    measured = it.evaluate(it.test)
    assert measured.accuracy == pytest.approx(2 / 5) and measured.f1 == measured.score
    assert measured.f1 == pytest.approx((1 + 0 + 2 / 3 + 1 + 0) / 5)
    assert it.loss(it.train.batch([0, 2])).item() == pytest.approx(1 - (1 + 2 / 3) / 2)


# Models


def test_kinds_of_models(folders: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    for name, folder in folders.items():
        assert load_language_model(str(folder), "auto", "auto")[2] == (
            "causal" if name in ("opt", "gpt2") else "masked"
        )
    bare = transformers.AutoModel.from_pretrained(folders["bert"], add_pooling_layer=False)
    bare.save_pretrained(tmp_path / "bare")
    transformers.AutoTokenizer.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(
        ValueError, match=r"expected a masked language model, got .*bare', which lacks the weights \['cls"
    ):
        load_language_model(str(tmp_path / "bare"), "auto", "auto")
    with pytest.raises(
        ValueError, match=r"of a masked language model that .* can load, got .*opt models can be causal$"
    ):
        load_language_model(str(folders["opt"]), "masked", "auto")
    transformers.T5Config(d_model=8, num_layers=1, num_heads=2, d_kv=4).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"of a causal or masked language model .*t5 models can be neither$"):
        load_language_model(str(tmp_path / "t5"), "auto", "auto")


def test_a_prompt_is_never_longer_than_the_model_can_read(folders: dict[str, Path]) -> None:
    """RoBERTa's 81 positions are 80 tokens."""
    most = {"opt": 128, "gpt2": 128, "bert": 64, "roberta": 80}
    for name, folder in folders.items():
        model, tokenizer, _ = load_language_model(str(folder), "auto", "auto")
        assert tokens_allowed(model, tokenizer, None) == most[name]
        with pytest.raises(ValueError, match=f"--max-tokens: expected at most {most[name]}, as many as the model can"):
            tokens_allowed(model, tokenizer, most[name] + 1)
        ids = torch.full((1, most[name]), 5)
        assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()


def test_masked_models_refuse_what_they_cannot_do(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"--task squad: expected a causal model, got a masked one.*are generated"):
        prompted(folders["roberta"], "squad")
    with pytest.raises(ValueError, match=r"--task copa: expected a causal model, .*sentences, not single tokens"):
        prompted(folders["bert"], "copa")
    with pytest.raises(ValueError, match="one token for the label word 'Maybe'"):
        prompted(folders["bert"], "cb")
