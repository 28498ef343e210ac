"""What a predictor takes: texts in an order, each of them a text, and nothing that Python takes for that by chance."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

for module in ("transformers", "datasets"):
    pytest.importorskip(module)

from tiny_run import WORDS, tiny_encoder  # noqa: E402
from tiny_tasks import row_of, tiny_opt  # noqa: E402

from zo_kernels.finetune.classifier.learner import TrainedClassifier  # noqa: E402
from zo_kernels.finetune.classifier.model import Classifier, load_encoder  # noqa: E402
from zo_kernels.finetune.prompts.language_model import load_language_model  # noqa: E402
from zo_kernels.finetune.prompts.predictor import Prompted  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> TrainedClassifier:
    encoder, tokenizer, size = load_encoder(str(tiny_encoder(tmp_path_factory.mktemp("tiny"))), torch.float32)
    torch.manual_seed(0)
    return TrainedClassifier(Classifier(encoder, size, 3).eval(), tokenizer, ("x", "y", "z"), max_tokens=8)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Prompted:
    model, tokenizer, kind = load_language_model(str(tiny_opt(tmp_path_factory.mktemp("opt"))), "auto", torch.float32)
    return Prompted(model, tokenizer, "sst2", kind, max_tokens=40, max_new_tokens=50)


TEXTS = ["apple fig", "iron", "zinc tin lead", "of"]
MANY: dict[str, Callable[[list[Any]], Any]] = {
    "a list": list, "a tuple": tuple, "an iterator": iter, "a generator": lambda rows: (row for row in rows)
}  # fmt: skip


@pytest.mark.parametrize("many", MANY)
def test_each_text_has_its_answer(many: str, classifier: TrainedClassifier, prompted: Prompted) -> None:
    rows = [row_of("sst2", random.Random(at)) for at in range(5)]
    for predictor, asked in ((classifier, TEXTS), (prompted, rows)):
        alone = [predictor.predict([one])[0] for one in asked]  # type: ignore[list-item]
        assert predictor.predict(MANY[many](asked)) == alone
        assert predictor.predict(MANY[many]([])) == []


def test_many_texts_are_answered_in_their_order(classifier: TrainedClassifier) -> None:
    draw, words = random.Random(0), [word for group in WORDS.values() for word in group]
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, 6))) for _ in range(200)]
    answers = classifier.predict(texts)
    assert len(set(answers)) > 1
    assert answers == [answer for text in texts for answer in classifier.predict([text])]


ONE = "predict: expected a list of texts, got .*: for a single one, use predict"
NO_TEXTS: dict[str, tuple[Any, type[Exception], str]] = {
    "one text": ("hello", TypeError, ONE),
    "bytes": (b"hello", TypeError, ONE),
    "a mapping": ({"text": "hello"}, TypeError, ONE),
    "None": (None, TypeError, "expected a list of texts, got a NoneType"),
    "a set": ({"hello"}, TypeError, "expected a list of texts, got a set"),
    "pairs": ([("premise", "hypothesis")], TypeError, "text 0: expected a text, got .'premise', 'hypothesis'"),
    "bytes among texts": (["apple", b"apple"], TypeError, "text 1: expected a text, got b'apple'"),
    "a number": (["apple", 7], TypeError, "text 1: expected a text, got 7"),
    "nothing": (["apple", None], TypeError, "text 1: expected a text, got None"),
    "an empty text": (["apple", ""], ValueError, "text 1: expected a text with words, got ''"),
    "a blank text": ([" \n"], ValueError, "text 0: expected a text with words, got"),
}


@pytest.mark.parametrize("wrong", NO_TEXTS)
def test_what_is_no_text(wrong: str, classifier: TrainedClassifier, prompted: Prompted) -> None:
    asked, error, message = NO_TEXTS[wrong]
    with pytest.raises(error, match=message):
        classifier.predict(asked)
    with pytest.raises(TypeError, match=r"predict: expected a list of rows, got|row .: expected a mapping"):
        prompted.predict(asked)


def test_texts_that_are_cut_are_counted(classifier: TrainedClassifier, prompted: Prompted) -> None:
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 8 tokens, .* and were cut") as caught:
        classifier.predict(["apple " * 7, "apple " * 6])
    assert caught[0].filename == __file__
    row = {"sentence": "a red hat " * 40}
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than 40 tokens, .* and were cut") as caught:
        prompted.predict([row])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier.predict(["apple " * 6])
