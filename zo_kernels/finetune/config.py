"""Every setting of a run, checked; a run folder keeps it as `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

METHODS = ("mezo", "sparse-mezo", "lezo", "mezo-svrg")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("fp32", "bf16", "fp16")
HEAD_STARTS = ("names", "few-shot", "random")
PERTURB = ("auto", "in_place", "in_forward")
ROUNDINGS = ("auto", "nearest", "stochastic")
FROZEN = ("nothing", "embeddings", "encoder")

DEFAULT_LR = {"mezo": 8e-5, "sparse-mezo": 3e-4, "lezo": 1.2e-4, "mezo-svrg": 6e-5}
_DEFAULT_SPARSITY = {"sparse-mezo": 0.75}
_DEFAULT_DROP = {"lezo": 0.5}


class Anchor(NamedTuple):
    """What MeZO-SVRG needs beside the rest."""

    lr: float
    every: int
    examples: int


DEFAULT_ANCHOR = Anchor(lr=1.2e-4, every=5, examples=128)


@dataclass
class Config:
    """The settings of one run. None asks for the default of the method, and is replaced by it at once.

    Raises ValueError naming the option, what was expected and what came.
    """

    model: str | None = None
    data: str | None = None
    test_data: str | None = None
    out: str | None = None
    overwrite: bool = False
    head_start: str = "few-shot"
    shots: int = 1
    freeze: str = "nothing"
    method: str = "mezo"
    lr: float | None = None
    schedule: str = "linear"
    eps: float = 1e-3
    weight_decay: float = 0.0
    directions: int = 1
    sparsity: float | None = None
    drop: float | None = None
    anchor_lr: float | None = None
    anchor_every: int | None = None
    anchor_examples: int | None = None
    perturb: str = "auto"
    rounding: str = "auto"
    steps: int = 500
    batch_size: int = 16
    max_tokens: int = 32
    eval_every: int = 100
    seed: int = 0
    threads: int = 2
    dtype: str = "fp32"
    device: str = "cpu"
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("dtype", DTYPES),
            ("head_start", HEAD_STARTS),
            ("freeze", FROZEN),
            ("perturb", PERTURB),
            ("rounding", ROUNDINGS),
        ):
            if getattr(self, name) not in choices:
                raise _wrong(name, f"one of {', '.join(choices)}", getattr(self, name))
        self._fill_in_method()
        for name in ("lr", "eps", "anchor_lr"):
            self._check_number(name, "a finite number above 0", lambda value: 0 < value < math.inf)
        self._check_number("weight_decay", "a finite number of at least 0", lambda value: 0 <= value < math.inf)
        for name in ("sparsity", "drop"):
            self._check_number(name, "a number from 0 to below 1", lambda value: 0 <= value < 1)
        for name in (
            "shots", "directions", "anchor_every", "anchor_examples", "steps", "batch_size", "eval_every", "threads",
        ):  # fmt: skip
            self._check_whole(name, 1)
        self._check_whole("max_tokens", 4)
        self._check_whole("seed", 0)
        if self.seed >= 2**63:
            raise _wrong("seed", "a whole number below 2**63", self.seed)
        if self.test_data is not None and self.data is None:
            raise ValueError(f"--test-data needs --data, got --test-data {self.test_data} alone")

    @property
    def anchor(self) -> Anchor | None:
        """The settings of the anchor, None for methods without one."""
        if self.anchor_lr is None or self.anchor_every is None or self.anchor_examples is None:
            return None
        return Anchor(self.anchor_lr, self.anchor_every, self.anchor_examples)

    def _fill_in_method(self) -> None:
        anchored = {
            "anchor_lr": DEFAULT_ANCHOR.lr,
            "anchor_every": DEFAULT_ANCHOR.every,
            "anchor_examples": DEFAULT_ANCHOR.examples,
        }
        for name, default in anchored.items():
            if self.method == "mezo-svrg":
                setattr(self, name, default if getattr(self, name) is None else getattr(self, name))
            elif getattr(self, name) is not None:
                raise ValueError(f"{_option(name)} belongs to --method mezo-svrg, got --method {self.method}")
        self.lr = DEFAULT_LR[self.method] if self.lr is None else self.lr
        self.sparsity = _DEFAULT_SPARSITY.get(self.method, 0.0) if self.sparsity is None else self.sparsity
        self.drop = _DEFAULT_DROP.get(self.method, 0.0) if self.drop is None else self.drop

    def _check_number(self, name: str, expected: str, accepts: Any) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not accepts(value):
            raise _wrong(name, expected, value)

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _wrong(name, f"a whole number of at least {least}", value)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _wrong(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{_option(name)}: expected {expected}, got {got!r}")
