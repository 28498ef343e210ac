"""What is to be measured, as it is sent to a process."""

from __future__ import annotations

from dataclasses import dataclass

from .peer import Settings

# Where passes dominate: the shape and its batch.
_STATED_FOR = ("opt-125m", 1, 32)
_SEED = 1  # of what is timed and checked; 0 is tried apart


@dataclass(frozen=True)
class Spec:
    """One experiment on one peer.

    Args:
        experiment: a name of `EXPERIMENTS`.
        peer: a name of `adapters.PEERS`.
        checkout: the path to its code, if that is how it is found.
        shape, batch, tokens, threads: what is stepped on.
        lr, eps: of all steps.
        steps, seeds: of the runs whose losses are compared.
        rounds, seconds: of the timing.
    """

    experiment: str
    peer: str
    checkout: str | None
    shape: str
    batch: int
    tokens: int
    threads: int
    lr: float
    eps: float
    steps: int
    seeds: list[int]
    rounds: int
    seconds: float

    @property
    def settings(self) -> Settings:
        return Settings(self.lr, self.eps, _SEED)

    @property
    def stated(self) -> bool:
        """Whether ours is to be faster by so much."""
        return (self.shape, self.batch, self.tokens) == _STATED_FOR and not self.ours

    @property
    def ours(self) -> bool:
        return self.peer.startswith("ours")

    @property
    def large(self) -> bool:
        """Whether weights are more than the buffers that a step takes whatever the model."""
        return self.shape != "tiny"
