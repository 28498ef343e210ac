"""The model and the task of `make demo`, or a table of texts, ready to be trained in any dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zo_kernels as zo
from zo_kernels.finetune.classifier.batches import Batch, Texts
from zo_kernels.finetune.classifier.model import Classifier, load_encoder, start_head
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.data.splits import from_tables
from zo_kernels.finetune.docstrings import stdlib_docstrings
from zo_kernels.finetune.pretrained import freeze, minilm_folder
from zo_kernels.weights.blocks import find_blocks

from ..bench.registry import Wrong
from ..kernels.cases import DTYPES
from ..step.exact import wrong_step
from .upcast import upcast

_docstrings = cache(stdlib_docstrings)
_METHODS = {"mezo": zo.MeZO, "lezo": zo.LeZO}


@dataclass(frozen=True)
class DemoTask:
    """A classifier with its head started, and tokenised docstrings."""

    config: Config
    classifier: Classifier
    training: Texts
    dev: Texts
    test: Texts

    def optimizer(self, perturb: str, rounding: str) -> zo.ZeroOrderOptimizer:
        """The demo's optimizer. A first step is checked and undone before.

        Raises:
            Wrong: that step leaves the method's formula.
        """
        start, batch = self.weights(), next(self.batches())
        wrong = wrong_step(self._optimizer(perturb, rounding), self.classifier, partial(self.loss, batch))
        self.set_weights(start)
        if wrong:
            raise Wrong(wrong)
        return self._optimizer(perturb, rounding)

    def _optimizer(self, perturb: str, rounding: str) -> zo.ZeroOrderOptimizer:
        c = self.config
        make: Any = _METHODS[c.method]
        given = {"lr": c.lr, "eps": c.eps, "seed": c.seed, "drop": c.drop, "distribution": c.distribution}
        return make(self.classifier, **given, perturb=perturb, rounding=rounding)

    def batches(self) -> Iterator[Batch]:
        """The endless batches that the demo trains on with this seed."""
        return self.training.endless(self.config.batch_size, torch.Generator().manual_seed(self.config.seed))

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.classifier(batch.input_ids, batch.attention_mask), batch.labels)

    def train(self, optimizer: zo.ZeroOrderOptimizer, batches: Iterable[Batch], rates: Iterable[float]) -> list[float]:
        """Take a step for each learning rate and return the losses."""
        losses = []
        for batch, lr in zip(batches, rates, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses.append(float(optimizer.step(partial(self.loss, batch))))
        return losses

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.classifier.parameters() if p.requires_grad]

    def weights(self) -> list[Tensor]:
        """Copies of the weights that are trained."""
        return [p.detach().clone() for p in self.trained()]

    @torch.no_grad()
    def set_weights(self, weights: list[Tensor]) -> None:
        for p, w in zip(self.trained(), weights, strict=True):
            p.copy_(w)


def demo_task(config: Config, blocks: int | None = None) -> DemoTask:
    """As `zo-finetune` makes it; but 16-bit weights are widened in the forward (`upcast`).

    With `blocks` the encoder has only so many of its first blocks.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    if config.data is None:
        data = _docstrings(seed=config.seed)
    else:
        data = from_tables(config.data, config.test_data, seed=config.seed)
    dtype = DTYPES[config.dtype]
    encoder, tokenizer, hidden_size = load_encoder(config.model or str(minilm_folder()), dtype)
    freeze(encoder, config.freeze)
    if blocks is not None:
        encoder.encoder.layer = encoder.encoder.layer[:blocks]
    classifier = Classifier(encoder, hidden_size, len(data.names)).to(dtype).eval()
    if dtype != torch.float32:
        upcast(classifier)
    tokens = min(config.max_tokens, encoder.config.max_position_embeddings)
    train, dev, test = (
        Texts.tokenize(tokenizer, split.texts, split.labels, tokens, torch.device("cpu"))
        for split in (data.train, data.dev, data.test)
    )
    start_head(classifier, config.head_start, tokenizer, data.names, train, config.shots)
    return DemoTask(config, classifier, train, dev, test)


@cache
def largest_matrix(model: str | None) -> Tensor:
    """The largest weight of the first block of the demo's model, in float32; not to be changed."""
    encoder, _, _ = load_encoder(model or str(minilm_folder()), torch.float32)
    return max(find_blocks(encoder)[0].parameters(), key=Tensor.numel).detach()
