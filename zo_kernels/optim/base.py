"""The base of all zeroth-order optimizers: arguments, parameter groups, state, and the step of plain SPSA."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, names
from ..ops import ROUNDINGS
from ..spec import direction_seed
from .blocks import block_of_parameters, dropped_blocks, find_blocks
from .thresholds import magnitude_threshold
from .weights import Excursion, Weight, Weights

Closure = Callable[[], "Tensor | float"]

MAX_DIRECTIONS = 2**16
_MAX_GRADIENT = 1e30  # times any learning rate in use it is finite in float32
_BLOCK_SLOT = 2**20 - 1  # of noise.direction_seed: draws the dropped blocks
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class ZeroOrderOptimizer(torch.optim.Optimizer):
    """SPSA with Gaussian directions that are regenerated from seeds, never stored (MeZO, arXiv 2305.17333).

    For each of n directions z_k, with L the closure's loss,

        g_k = (L(θ + ε z_k) - L(θ - ε z_k)) / 2ε
        θ  <- (1 - lr * weight_decay) θ - lr / n * sum_k g_k z_k

    Weights are changed in place, in 2n + 1 fused passes a step; the last pass restores and updates at once. In
    16-bit weights every pass rounds, so perturbation in place is meant for float32; a warning says so.

    Args:
        params: a module; or what `torch.optim` takes: parameters, named parameters, or groups of either. Those that do
            not require grad are left alone. Noise goes by a parameter's qualified name, or by its position if unnamed.
        lr: learning rate.
        eps: the perturbation's scale ε. One for all groups.
        weight_decay: decoupled; not applied to normalisation layers and to parameters of fewer than two dimensions
            unless the group has `decay_all=True`.
        seed: 64-bit seed of the run.
        directions: directions a step.
        sparsity: the fraction of each tensor left alone: only weights with |θ| <= h take part, h being the exact
            percentile when the optimizer is made (arXiv 2402.15751). The mask is taken from unperturbed weights in
            every step.
        drop: the fraction of transformer blocks left alone in a step, drawn anew every step (arXiv 2410.09823).
        blocks: the blocks, as modules; None to find them in the module (`optim.blocks.find_blocks`).
        perturb: "auto" or "in_place".
        rounding: "nearest", "stochastic", or "auto": stochastic. It matters to 16-bit weights alone.
        backend: see `zo_kernels.add_noise_`.

    `lr`, `eps`, `weight_decay`, `decay_all` and `sparsity` may be given for each group.

    Attributes:
        step_count: steps taken, refused ones included.
        refused_steps: steps refused because a loss was not finite.
        projected_gradients: g_k of the last step.

    Raises:
        TypeError, ValueError: an argument is out of range, or a parameter cannot be perturbed; the message names it.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        directions: int = 1,
        sparsity: float = 0.0,
        drop: float = 0.0,
        blocks: Sequence[nn.Module] | None = None,
        perturb: str = "auto",
        rounding: str = "auto",
        backend: str | None = None,
    ):
        self.seed = checks.integer("seed", seed, 0, checks.MAX_SEED)
        self.directions = checks.integer("directions", directions, 1, MAX_DIRECTIONS)
        self.drop = checks.number("drop", drop, 0.0, 1.0, open_high=True)
        self.perturb = checks.choice("perturb", perturb, ("auto", "in_place"))
        self.rounding = checks.choice("rounding", rounding, ("auto", *ROUNDINGS))
        self.backend = backend
        self.step_count = 0
        self.refused_steps = 0
        self.projected_gradients: list[float] = []
        self._weights: Weights | None = None
        self._built_for: tuple[list[Any], int] | None = None

        module = params if isinstance(params, nn.Module) else None
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay_all": False,
            "sparsity": sparsity,
        }
        _check_group(defaults, "")
        given: Any = params if module is None else list(module.named_parameters())
        super().__init__(given, defaults)

        self._norms = _norm_parameters(module)
        self._names = self._name(module)
        self._ids = self._identify()
        found = self._find_blocks(module, blocks)
        self._n_blocks, self._block_of = len(found), block_of_parameters(found)
        self._thresholds: dict[Tensor, float] = {}
        self._prepare()
        if perturb == "auto" and any(p.element_size() < 4 for p in self._trainable()):
            warnings.warn(
                "perturbing 16-bit weights in place rounds them three times a step, so they drift; "
                "float32 weights do not (perturb='in_place' silences this warning)",
                stacklevel=2 + (type(self).__init__ is not ZeroOrderOptimizer.__init__),  # the line that makes it
            )

    def _name(self, module: nn.Module | None) -> dict[Tensor, str]:
        """Each parameter's name; those of a module include what is frozen, so that freezing changes no id."""
        every: dict[Tensor, str] = {}
        if module is not None:
            # A tied parameter has several names; the smallest does not depend on the order of registration.
            named = list(module.named_parameters(remove_duplicate=False))
            bare = names.strip_wrappers(name for name, _ in named)
            for name, p in named:
                every[p] = min(every.get(p, name), name, key=lambda n: (bare[n], n))
            return every
        for group in self.param_groups:
            self._name_group(every, group)
        return every

    @staticmethod
    def _name_group(every: dict[Tensor, str], group: dict[str, Any]) -> None:
        given, taken = group.get("param_names"), set(every.values())
        for i, p in enumerate(group["params"]):
            name = given[i] if given else str(len(every))
            while name in taken:  # two models in one optimizer
                name += "'"
            every.setdefault(p, name)
            taken.add(name)

    def _identify(self) -> dict[Tensor, int]:
        ids = names.param_ids(self._names.values())
        return {p: ids[name] for p, name in self._names.items()}

    def _find_blocks(self, module: nn.Module | None, blocks: Sequence[nn.Module] | None) -> Sequence[nn.Module]:
        if blocks is not None:
            found = checks.sequence("blocks", list(blocks) if isinstance(blocks, nn.ModuleList) else blocks)
            for i, block in enumerate(found):
                if not isinstance(block, nn.Module):
                    raise TypeError(f"blocks[{i}]: expected a module, got {type(block).__name__}")
            if not found:
                raise ValueError("blocks: expected at least one module, got none")
            return found
        if self.drop == 0.0:
            return []
        if module is None:
            raise ValueError("drop: the blocks of bare parameters are unknown; give the module first, or blocks=")
        return find_blocks(module)

    def _trainable(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"] if p.requires_grad]

    def _prepare(self) -> Weights:
        """The tables, built anew if a parameter was frozen, unfrozen, moved or added since the last pass."""
        if self._built_for is None:
            for p in self._trainable():
                checks.weight(self._names[p], p)
        trainable = [(id(p), p.data_ptr(), p.numel(), p.dtype) for p in self._trainable()]
        signature = (trainable, len(self.param_groups))
        if self._weights is not None and signature == self._built_for:
            return self._weights
        if self._built_for is not None and self._built_for[0] != trainable:
            self._on_other_weights()
        found = []
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                name = self._names[p]
                exempt = p in self._norms or p.dim() < 2
                row = 2 * g + int(exempt and not group["decay_all"])
                found.append(Weight(name, p, self._ids[p], row, self._block_of.get(p), self._threshold(p, group)))
        if not found:
            raise ValueError("params: expected at least one parameter that requires grad, got none")
        self._weights = Weights(
            found, 2 * len(self.param_groups), self.rounding != "nearest", self._anchors(found), self.backend
        )
        self._built_for = signature
        return self._weights

    def _on_other_weights(self) -> None:
        """Called when other memory is trained than in the last step."""

    def _anchors(self, weights: Sequence[Weight]) -> Sequence[Tensor] | None:
        """Snapshots that passes may start from, for methods that have them."""
        return None

    def _threshold(self, p: Tensor, group: dict[str, Any]) -> float | None:
        if group["sparsity"] == 0.0:
            return None
        if p not in self._thresholds:
            self._thresholds[p] = magnitude_threshold(p, group["sparsity"])
        return self._thresholds[p]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the new parameters take part from the next step on."""
        if isinstance(param_group, dict):  # torch refuses anything else, and says so
            _check_group({**self.defaults, **param_group}, f"param_groups[{len(self.param_groups)}]: ")
        super().add_param_group(param_group)
        if hasattr(self, "_names"):  # not while the base class is adding the first groups
            self._name_group(self._names, self.param_groups[-1])
            self._ids = self._identify()

    def _eps(self) -> float:
        values = {group["eps"] for group in self.param_groups}
        if len(values) != 1:
            raise ValueError(f"eps: expected one value for all groups, got {sorted(values)}")
        return _check_eps("eps", values.pop())

    def _rates(self, key: str = "lr") -> list[float]:
        """A learning rate for each row."""
        return [checks.number(key, g[key], 0.0) for g in self.param_groups for _ in range(2)]

    def _decays(self, rates: Sequence[float]) -> list[float]:
        """The factor of the old weights for each row: the odd rows are exempt from weight decay."""
        wd = [w for g in self.param_groups for w in (checks.number("weight_decay", g["weight_decay"], 0.0), 0.0)]
        return [1.0 - lr * w for lr, w in zip(rates, wd, strict=True)]

    def _seeds(self, first_slot: int = 0) -> list[int]:
        return [direction_seed(self.seed, self.step_count, first_slot + k) for k in range(self.directions)]

    def _draw_dropped(self) -> frozenset[int]:
        if self.drop == 0.0:
            return frozenset()
        return dropped_blocks(self._n_blocks, self.drop, direction_seed(self.seed, self.step_count, _BLOCK_SLOT))

    def _refuse(self, error: type[Exception], message: str) -> Exception:
        """Count a refused step; the next one draws other directions, since these might fail for ever."""
        self.step_count += 1
        self.refused_steps += 1
        return error(f"closure: {message}; the step is refused, the weights are restored")

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor | float:  # type: ignore[override]
        """One step: two evaluations of the loss a direction, then the update.

        Args:
            closure: returns the loss, a scalar tensor or a number; called 2 * directions times, without gradients. It
                should be deterministic within a step (same batch, same dropout).

        Returns:
            The mean of the losses seen, as a tensor if the closure returns tensors.

        Raises:
            TypeError, ValueError: the closure returned no finite scalar, or losses too far apart for float32. The step
                is refused, counted in `refused_steps`, and the weights are restored. Whatever the closure raises also
                leaves restored weights behind. Restored means up to float rounding of the passes in place.
        """
        _check_closure("closure", closure)
        eps, rates = self._eps(), self._rates()
        decays = self._decays(rates)
        weights = self._prepare()
        excursion = Excursion(weights, weights.active(self._draw_dropped()))
        seeds = self._seeds()
        losses: list[Any] = []
        gradients = self._probe(excursion, closure, seeds, eps, losses)
        n = len(seeds)
        update = {s: [-lr * g / n for lr in rates] for s, g in zip(seeds, gradients, strict=True)}
        excursion.finish(update, decays)
        self.projected_gradients = gradients
        self.step_count += 1
        return sum(losses) / len(losses)

    def _probe(
        self, excursion: Excursion, closure: Closure, seeds: Sequence[int], eps: float, losses: list[Any]
    ) -> list[float]:
        """g of each seed; the weights end at the last probe. On any failure they are restored."""
        gradients = []
        try:
            for seed in seeds:
                pair = []
                for signed in (eps, -eps):
                    excursion.to({seed: signed})
                    pair.append(self._evaluate(closure, losses))
                gradients.append(self._difference(pair, eps))
        except BaseException:
            excursion.to({})
            raise
        return gradients

    def _evaluate(self, closure: Closure, losses: list[Any]) -> float:
        """The closure's loss as a number; what it returned is added to `losses`."""
        loss = value = closure()
        wanted = "expected a scalar loss, a tensor or a number"
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise self._refuse(ValueError, f"expected a scalar loss, got a tensor of shape {tuple(loss.shape)}")
            loss, value = loss.clone(), loss.item()  # a closure may write all its losses to one tensor
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._refuse(TypeError, f"{wanted}, got {type(value).__name__}")
        if not math.isfinite(value):
            raise self._refuse(ValueError, f"expected a finite loss, got {value}")
        losses.append(loss)
        return float(value)

    def _difference(self, pair: Sequence[float], eps: float) -> float:
        """g = (L+ - L-) / 2ε."""
        g = (pair[0] - pair[1]) / (2 * eps)
        if not abs(g) <= _MAX_GRADIENT:
            raise self._refuse(
                ValueError, f"expected losses whose difference fits float32, got {pair[0]} and {pair[1]}"
            )
        return g

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, and what the run needs to go on bit for bit, under "zo"."""
        return {**super().state_dict(), "zo": self._zo_state()}

    def _zo_state(self) -> dict[str, Any]:
        parameters = [p for g in self.param_groups for p in g["params"]]
        return {
            "method": type(self).__name__,
            "noise": "v1",
            "seed": self.seed,
            "step_count": self.step_count,
            "refused_steps": self.refused_steps,
            "directions": self.directions,
            "drop": self.drop,
            "param_ids": [self._ids[p] for p in parameters],
            "thresholds": [self._thresholds.get(p) for p in parameters],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a run: the next step draws what it would have drawn.

        Raises:
            ValueError: the state is of another kind of optimizer, or its parameters have other ids (names).
        """
        if "zo" not in state_dict:
            raise ValueError("state_dict: expected the state of a zeroth-order optimizer, got one without 'zo'")
        zo = state_dict["zo"]
        ours = self._zo_state()
        for key in ("method", "noise", "param_ids"):
            if zo.get(key) != ours[key]:
                raise ValueError(f"state_dict: expected {key} {ours[key]!r}, got {zo.get(key)!r}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        for key in ("seed", "step_count", "refused_steps", "directions", "drop"):
            setattr(self, key, zo[key])
        parameters = [p for g in self.param_groups for p in g["params"]]
        self._thresholds = {p: h for p, h in zip(parameters, zo["thresholds"], strict=True) if h is not None}
        self._weights = None

    def __getstate__(self) -> dict[str, Any]:
        # The tables hold addresses, so a copy builds its own; a scheduler's wrapper of `step` is bound to the original.
        own = {k: v for k, v in self.__dict__.items() if k != "step"}
        return {**own, "_weights": None, "_built_for": None}


def _check_group(group: dict[str, Any], where: str) -> None:
    checks.number(f"{where}lr", group["lr"], 0.0)
    _check_eps(f"{where}eps", group["eps"])
    checks.number(f"{where}weight_decay", group["weight_decay"], 0.0)
    checks.number(f"{where}sparsity", group["sparsity"], 0.0, 1.0, open_high=True)


def _check_eps(name: str, eps: Any) -> float:
    return checks.number(name, eps, checks.MIN_FLOAT32, checks.MAX_FLOAT32)


def _check_closure(name: str, closure: Any) -> None:
    if not callable(closure):
        raise TypeError(f"{name}: expected a function that returns the loss, got {type(closure).__name__}")


def _norm_parameters(module: nn.Module | None) -> set[Tensor]:
    if module is None:
        return set()
    return {p for m in module.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
