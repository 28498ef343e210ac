"""16-bit weights under 32-bit arithmetic, as GPUs accumulate, on CPUs whose 16-bit matrix products are slow."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def upcast(model: nn.Module) -> None:
    """Let the model's linear layers, embeddings and normalisations widen their weights in each forward.

    Activations are float32; the weights keep their dtype, and are read from the module when it runs.
    """
    for m in model.modules():
        m.__class__ = _WIDENED.get(type(m), type(m))


def _wide(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float()


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), _wide(self.bias))


class _Embedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, _wide(self.weight), _wide(self.bias), self.eps)


_WIDENED: dict[type, type] = {nn.Linear: _Linear, nn.Embedding: _Embedding, nn.LayerNorm: _LayerNorm}
