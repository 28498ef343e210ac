"""What an optimizer was told of a module, and whether that is still so: its modules and parameters may be replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .. import names


class Structure:
    """The modules and parameters of a tree as they were when somebody last looked.

    Attributes:
        names: each parameter, frozen ones too -> its name.
    """

    names: dict[Tensor, str]
    _tables: list[dict[str, Any]] | None = None  # of parameters and modules within each module

    def __init__(self, module: nn.Module, given: Iterable[Tensor]):
        self._module = module
        self.look(given)

    def look(self, given: Iterable[Tensor]) -> None:
        """Take it as it is now, for an optimizer that was given these parameters."""
        self.names, given = names.of_module(self._module), set(given)
        self._others = [p for p in self.names if p not in given]
        # Those of TorchScript's modules are made anew whenever they are asked for.
        own = [m for m in self._module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        tables: list[dict[str, Any]] = [d for m in own for d in (m._parameters, m._modules)]
        self._seen, self._tables = _entries(tables), tables

    def changed(self, given: Callable[[], Iterable[Tensor]]) -> bool:
        """Whether a module or a parameter came, went or was replaced, or one that the optimizer was not given is to be
        trained now. Asked in every step, of hundreds of them.

        Args:
            given: the optimizer's parameters.
        """
        if self._tables is None:
            self.look(given())
            return False
        now = _entries(self._tables)
        if len(now) != len(self._seen) or not all(map(is_, now, self._seen)):
            return True
        return any(p.requires_grad for p in self._others)

    def check(self, given: Iterable[Tensor]) -> None:
        """Raise ValueError unless those of an optimizer's parameters that require grad, and were the module's when
        somebody last looked, still are, and the module has no others that do.
        """
        now, given = names.of_module(self._module), set(given)
        if gone := [self.names[p] for p in given if p.requires_grad and p in self.names and p not in now]:
            raise ValueError(
                f"params: the module no longer has {names.listed(sorted(gone))}, which the optimizer trains; others "
                "are in their place, or none (after load_state_dict(assign=True), a new head, resized embeddings, an "
                "adapter). Make the optimizer after such a change; load_state_dict(old.state_dict()) takes the run "
                "along, if names and shapes are the same"
            )
        if new := [name for p, name in now.items() if p.requires_grad and p not in given]:
            raise ValueError(
                f"params: the module now has {names.listed(sorted(new))}, which require grad and are in none of the "
                "optimizer's groups, so that they would not be trained. Add them by add_param_group({'params': [...]}),"
                " freeze them (requires_grad_(False)), or make the optimizer after such a change"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"_module": self._module, "names": self.names}  # a copied module may not be whole yet


def _entries(tables: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, tables)))
