"""How each peer is run: a module a peer, with `load(path)`.

A peer's own code makes the step; an adapter gives it the model, the loss, lr and ε, and nothing else. What cannot run
is said, not imitated: `Unavailable`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from ..peer import Peer


@dataclass(frozen=True)
class Adapter:
    """Where a peer is found.

    Args:
        module: here.
        checkout: the name of the option that points to it; None for what is installed, or belongs to these benchmarks.
        variant: passed to the module's `load`.
    """

    module: str
    checkout: str | None = None
    variant: str | None = None

    def load(self, path: str | None) -> Peer:
        """Import the peer.

        Raises:
            Unavailable: it cannot run here.
        """
        module = importlib.import_module(f".{self.module}", __name__)
        given = () if self.variant is None else (self.variant,)
        return module.load(*given) if path is None else module.load(Path(path), *given)


OURS = Adapter("ours", variant="in_place")
PEERS = {
    "ours": OURS,
    "ours-in-forward": Adapter("ours", variant="in_forward"),
    "published": Adapter("published"),
    "mezo": Adapter("mezo", "mezo"),
    "zo2": Adapter("zo2", "zo2"),
    "zo-llm": Adapter("zo_llm", "zo_llm"),
    "mezo-svrg": Adapter("mezo_svrg", "mezo_svrg"),
    "torchzero": Adapter("torchzero"),
    "zotitan": Adapter("zotitan", variant="triton"),
    "zotitan-randn": Adapter("zotitan", variant="randn"),
}
