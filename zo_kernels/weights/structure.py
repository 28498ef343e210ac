"""Notices submodules and parameters of a module that were added, removed or replaced since the optimizer was made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .. import names


class Structure:
    """The submodules and parameters of a module, as `look` last found them.

    Args:
        module: the root.
        given: the optimizer's parameters.

    Attributes:
        names: the name of each parameter, frozen ones too.
    """

    names: dict[Tensor, str]
    _tables: list[dict[str, Any]] | None = None  # `_parameters` and `_modules` of each module

    def __init__(self, module: nn.Module, given: Iterable[Tensor]):
        self._module = module
        self.look(given)

    def look(self, given: Iterable[Tensor]) -> None:
        """Remember the module as it is now, for an optimizer with these parameters."""
        self.names, given = names.of_module(self._module), set(given)
        self._others = [p for p in self.names if p not in given]
        # TorchScript makes these tables anew whenever they are asked for.
        own = [m for m in self._module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        tables: list[dict[str, Any]] = [d for m in own for d in (m._parameters, m._modules)]
        self._seen, self._tables = _entries(tables), tables

    def changed(self, given: Callable[[], Iterable[Tensor]]) -> bool:
        """Whether a module or parameter came, went or was replaced, or a parameter outside the optimizer was unfrozen.

        Called in every step, for hundreds of modules.

        Args:
            given: returns the optimizer's parameters.
        """
        if self._tables is None:
            self.look(given())
            return False
        now = _entries(self._tables)
        if len(now) != len(self._seen) or not all(map(is_, now, self._seen)):
            return True
        return any(p.requires_grad for p in self._others)

    def check(self, given: Iterable[Tensor]) -> None:
        """Raise ValueError if the module has lost a trained parameter of the optimizer, or has a new one that requires
        grad and is in none of its groups.
        """
        now, given = names.of_module(self._module), set(given)
        if gone := [self.names[p] for p in given if p.requires_grad and p in self.names and p not in now]:
            raise ValueError(
                f"params: the module no longer has {names.listed(sorted(gone))}, which the optimizer trains: they were "
                "replaced or removed (by load_state_dict(assign=True), a new head, resized embeddings, an adapter). "
                "Create a new optimizer after such a change; if names and shapes are the same, "
                "new.load_state_dict(old.state_dict()) continues the run"
            )
        if new := [name for p, name in now.items() if p.requires_grad and p not in given]:
            raise ValueError(
                f"params: the module now has {names.listed(sorted(new))}, which require grad but are in none of the "
                "optimizer's groups, so they would not be trained. Add them with add_param_group({'params': [...]}), "
                "freeze them with requires_grad_(False), or create the optimizer after such a change"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Without `_tables`: a copied module may not be whole yet.
        return {"_module": self._module, "names": self.names}


def _entries(tables: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, tables)))
