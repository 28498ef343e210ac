"""The settings of a run, checked. The run folder keeps them as `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from zo_kernels.finetune.tasks import TASKS
from zo_kernels.spec import DISTRIBUTIONS

METHODS = ("mezo", "sparse-mezo", "lezo", "mezo-svrg", "fzoo")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("fp32", "bf16", "fp16")
HEAD_STARTS = ("names", "few-shot", "random")
PERTURB = ("auto", "in_place", "in_forward")
ROUNDINGS = ("auto", "nearest", "stochastic")
FROZEN = ("nothing", "embeddings", "encoder")
MODEL_KINDS = ("auto", "causal", "masked")
LOSSES = ("candidates", "tokens")
OBJECTIVES = ("loss", "accuracy", "f1")
ESTIMATORS = ("two_sided", "one_sided")
NORMALIZE = ("none", "std", "rms")
MASKS = ("redrawn", "kept")
AUTO = "auto"

DEFAULT_LR = {"mezo": 8e-5, "sparse-mezo": 3e-4, "lezo": 1.2e-4, "mezo-svrg": 6e-5, "fzoo": 5e-3}
TASK_LR = {"mezo": 1e-6, "sparse-mezo": 2e-6, "lezo": 1e-6, "mezo-svrg": 1e-6, "fzoo": 1e-4}
CLASSIFIER_TOKENS = 32
_MOST_THREADS = 4096
_MOST_ANCHOR_EXAMPLES = 2**24  # all their batches are in memory at once
_DEFAULT_SPARSITY = {"sparse-mezo": 0.75}
_DEFAULT_DROP = {"lezo": 0.5}
_DEFAULT_DIRECTIONS = {"fzoo": 8}
_DEFAULT_DISTRIBUTION = {"fzoo": "rademacher"}
# The estimator and what it is divided by, of methods that have one of their own. Others may choose.
_OWN_ESTIMATOR: dict[str, tuple[str | None, str | None]] = {"fzoo": ("one_sided", "std"), "mezo-svrg": (None, None)}
# Settings that belong to one kind of run only. With these values they count as not set.
_OF_TASK: dict[str, Any] = {"model_kind": "auto", "objective": "loss", "max_new_tokens": 50}
_OF_CLASSIFIER: dict[str, Any] = {"head_start": "few-shot", "shots": 1}
ALL = "all"


class Anchor(NamedTuple):
    """Settings of MeZO-SVRG's anchor.

    If `lr` is None, steps at an anchor use twice the learning rate of other steps.
    """

    lr: float | None
    every: int
    examples: int


DEFAULT_ANCHOR = Anchor(lr=None, every=5, examples=128)


@dataclass
class Config:
    """The settings of one run; the fields are the options of `zo-finetune`.

    None stands for the default of the method or the task, which replaces it at once. Three defaults are found later:
    the numbers of examples (from the data), `max_tokens` of a task (from the model), and `anchor_lr` (twice the current
    lr). So is an `lr` of "auto", by the first steps of the run.

    Raises ValueError that names the option, what was expected and what came, also if an option would have no effect.
    """

    model: str | None = None
    data: str | None = None
    test_data: str | None = None
    task: str | None = None
    task_data: str | None = None
    model_kind: str = "auto"
    loss: str | None = None
    objective: str = "loss"
    train_examples: int | None = None
    dev_examples: int | None = None
    test_examples: int | str | None = None
    max_new_tokens: int = 50
    out: str | None = None
    overwrite: bool = False
    head_start: str = "few-shot"
    shots: int = 1
    freeze: str = "nothing"
    method: str = "mezo"
    lr: float | str | None = None
    schedule: str = "linear"
    eps: float = 1e-3
    weight_decay: float = 0.0
    directions: int | None = None
    estimator: str | None = None
    normalize: str | None = None
    sparsity: float | None = None
    mask: str = "redrawn"
    drop: float | None = None
    anchor_lr: float | None = None
    anchor_every: int | None = None
    anchor_examples: int | None = None
    anneal: float | None = None
    anneal_above: float | None = None
    perturb: str = "auto"
    rounding: str = "auto"
    distribution: str | None = None
    steps: int = 500
    batch_size: int = 16
    max_tokens: int | None = None
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
            ("distribution", (None, *DISTRIBUTIONS)),
            ("estimator", (None, *ESTIMATORS)),
            ("normalize", (None, *NORMALIZE)),
            ("mask", MASKS),
            ("model_kind", MODEL_KINDS),
            ("loss", (None, *LOSSES)),
            ("objective", OBJECTIVES),
            ("task", (None, *TASKS)),
        ):
            if getattr(self, name) not in choices:
                raise _wrong(name, f"one of {', '.join(filter(None, choices))}", getattr(self, name))
        self._fill_in_task()
        self._fill_in_method()
        if self.lr != AUTO:
            self._check_number("lr", f"a finite number above 0, or {AUTO}", lambda value: 0 < value < math.inf)
        for name in ("eps", "anchor_lr"):
            self._check_number(name, "a finite number above 0", lambda value: 0 < value < math.inf)
        self._check_number("anneal", "a finite number above 1", lambda value: 1 < value < math.inf)
        self._check_number("anneal_above", "a finite number of at least 1", lambda value: 1 <= value < math.inf)
        self._check_number("weight_decay", "a finite number of at least 0", lambda value: 0 <= value < math.inf)
        for name in ("sparsity", "drop"):
            self._check_number(name, "a number from 0 to below 1", lambda value: 0 <= value < 1)
        for name in (
            "shots", "directions", "anchor_every", "steps", "batch_size", "eval_every", "train_examples",
            "dev_examples", "max_new_tokens",
        ):  # fmt: skip
            self._check_whole(name, 1)
        if isinstance(self.test_examples, str) and self.test_examples != ALL:
            raise _wrong("test_examples", f"a whole number of at least 1, or {ALL}", self.test_examples)
        if self.test_examples != ALL:
            self._check_whole("test_examples", 1)
        self._check_effect()
        self._check_whole("threads", 1, _MOST_THREADS)
        self._check_whole("anchor_examples", 1, _MOST_ANCHOR_EXAMPLES)
        self._check_whole("max_tokens", 4)
        self._check_whole("seed", 0, 2**63 - 1)
        if self.test_data is not None and self.data is None:
            raise ValueError(f"--test-data: expected together with --data, got --test-data {self.test_data} alone")

    @property
    def anchor(self) -> Anchor | None:
        """The settings of the anchor. None for methods that have none."""
        if self.anchor_every is None or self.anchor_examples is None:
            return None
        return Anchor(self.anchor_lr, self.anchor_every, self.anchor_examples)

    def _fill_in_task(self) -> None:
        of_task = ("task_data", "train_examples", "dev_examples", "loss", *_OF_TASK)
        of_classifier = ("data", "test_data", *_OF_CLASSIFIER)
        if self.task is None:
            for name in of_task:
                if getattr(self, name) != _OF_TASK.get(name):
                    raise ValueError(f"{_option(name)} belongs to --task, got {getattr(self, name)!r} without a task")
            self.max_tokens = CLASSIFIER_TOKENS if self.max_tokens is None else self.max_tokens
            return
        for name in of_classifier:
            if getattr(self, name) != _OF_CLASSIFIER.get(name):
                raise ValueError(f"{_option(name)} belongs to a classifier, got {getattr(self, name)!r} with --task")
        if self.model is None:
            raise ValueError(
                "--task: expected together with --model, a causal or masked language model, got no --model"
            )
        if self.freeze == "encoder":
            raise _wrong(
                "freeze",
                "nothing or embeddings with --task, since these models have no separate head to train",
                self.freeze,
            )
        task = TASKS[self.task]
        self.loss = task.loss if self.loss is None else self.loss
        generates = task.references is not None
        if generates and (self.loss == "candidates" or self.objective == "accuracy"):
            raise ValueError(
                f"--task {self.task} is learned by generating answers: expected --loss tokens and --objective loss or "
                f"f1, got --loss {self.loss} and --objective {self.objective}"
            )
        if not generates and self.objective == "f1":
            raise ValueError(f"--objective: expected loss or accuracy for --task {self.task}, got f1")

    def _check_effect(self) -> None:
        """Raise ValueError for an option that would have no effect."""
        if self.shots != _OF_CLASSIFIER["shots"] and self.head_start != "few-shot":
            raise ValueError(
                f"--shots belongs to --head-start few-shot, got {self.shots} with --head-start {self.head_start}"
            )
        generates = self.task is not None and TASKS[self.task].references is not None
        if self.max_new_tokens != _OF_TASK["max_new_tokens"] and not generates:
            raise ValueError(
                f"--max-new-tokens belongs to a task whose answers are generated, got {self.max_new_tokens} with "
                f"--task {self.task}"
            )
        if self.freeze == "encoder" and self.drop:
            raise ValueError(
                f"--drop leaves some blocks of the encoder unchanged, got {self.drop} with --freeze encoder, which "
                "trains none of them"
            )
        if self.mask != MASKS[0] and not self.sparsity:
            raise ValueError(f"--mask belongs to --sparsity above 0, got {self.mask} with {self.sparsity}")
        if self.anneal_above is not None and self.anneal is None:
            raise ValueError(f"--anneal-above belongs to --anneal, got {self.anneal_above} alone")
        if self.normalize == "std" and self.directions == 1:
            raise ValueError(
                "--normalize std is the deviation over the --directions of a step: expected at least 2 of them, got 1; "
                "take more, or --normalize rms"
            )
        if self.rounding != "auto" and self.dtype == "fp32":
            raise ValueError(f"--rounding belongs to 16-bit weights, got {self.rounding} with --dtype fp32")

    def _fill_in_method(self) -> None:
        no_rate = self.lr is None
        rates = DEFAULT_LR if self.task is None else TASK_LR
        anchored = {f"anchor_{name}": default for name, default in DEFAULT_ANCHOR._asdict().items()}
        for name, default in (anchored | {"anneal": None, "anneal_above": None}).items():
            if self.method == "mezo-svrg":
                setattr(self, name, default if getattr(self, name) is None else getattr(self, name))
            elif getattr(self, name) is not None:
                raise ValueError(f"{_option(name)} belongs to --method mezo-svrg, got --method {self.method}")
        defaults: dict[str, Any] = {"estimator": ESTIMATORS[0], "normalize": NORMALIZE[0]}
        if self.method in _OWN_ESTIMATOR:
            defaults = dict(zip(defaults, _OWN_ESTIMATOR[self.method], strict=True))
            for name, own in defaults.items():
                if getattr(self, name) not in (None, own):
                    raise ValueError(
                        f"{_option(name)}: --method {self.method} has its own"
                        f"{'' if own is None else f', {own}'}; got {getattr(self, name)}"
                    )
        elif no_rate and self.normalize not in (None, NORMALIZE[0]):
            raise ValueError(
                f"--normalize {self.normalize}: expected together with --lr, since rates are in units of the weights "
                f"then, 5e-3 to begin with, got none; --lr {AUTO} finds one"
            )
        defaults["directions"] = _DEFAULT_DIRECTIONS.get(self.method, 1)
        defaults["distribution"] = _DEFAULT_DISTRIBUTION.get(self.method, DISTRIBUTIONS[0])
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.lr = rates[self.method] if self.lr is None else self.lr
        self.sparsity = _DEFAULT_SPARSITY.get(self.method, 0.0) if self.sparsity is None else self.sparsity
        self.drop = _DEFAULT_DROP.get(self.method, 0.0) if self.drop is None else self.drop

    def _check_number(self, name: str, expected: str, accepts: Any) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not accepts(value):
            raise _wrong(name, expected, value)

    def _check_whole(self, name: str, least: int, most: int = 2**31 - 1) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _wrong(name, f"a whole number of at least {least}", value)
        if value > most:
            raise _wrong(name, f"a whole number of at most {most}", value)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _wrong(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{_option(name)}: expected {expected}, got {got!r}")
