"""Random numbers for reading the training examples, separate from all others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_numpy: Any = np.random
_DEEP = 4  # how far generators are looked for
_MANY = 16  # parts of a list that is looked through


class Draws:
    """States of the generators of PyTorch (CPU), NumPy and Python that are used while examples are read."""

    def __init__(self, seed: int):
        """seed: below 2⁶³."""
        own = torch.Generator().manual_seed(seed)
        self._torch, self._python = own.get_state(), random.Random(seed).getstate()
        self._numpy = np.random.MT19937(seed)
        torch.empty((), dtype=torch.int64, device="cpu").random_(generator=own)
        # A DataLoader begins by drawing a seed for its workers, unless it has a generator of its own.
        self._unused = ((self._torch, own.get_state()), self._python, _position(self._numpy))

    @contextmanager
    def drawn_from(self) -> Iterator[None]:
        """Use these states in place of the process's own."""
        outside = torch.default_generator.get_state(), random.getstate(), _numpy.get_bit_generator()
        torch.default_generator.set_state(self._torch)
        random.setstate(self._python)
        _numpy.set_bit_generator(self._numpy)  # copying its state would take ten times as long
        try:
            yield
        finally:
            self._torch, self._python = torch.default_generator.get_state(), random.getstate()
            torch.default_generator.set_state(outside[0])
            random.setstate(outside[1])
            _numpy.set_bit_generator(outside[2])

    @property
    def used(self) -> bool:
        """Whether any number was drawn."""
        begun, python, numpy = self._unused
        same = any(torch.equal(self._torch, state) for state in begun)
        return not (same and self._python == python and _position(self._numpy) == numpy)


def _position(generator: np.random.MT19937) -> tuple[int, bytes]:
    state: Any = generator.state["state"]
    return int(state["pos"]), state["key"].tobytes()


def own_generators(roots: Mapping[str, Any]) -> dict[str, Any]:
    """The states of generators in the attributes of datasets, samplers and collators: path -> state, fit for JSON."""
    return {name: _state_of(generator) for name, generator in _found(roots).items()}


def set_own_generators(roots: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Set the generators that still exist to the states that `own_generators` returned."""
    for collator_name, collator in _found(roots, _makes_its_generator).items():
        if (f"{collator_name}.generator" in states) != (collator.generator is not None):
            collator.generator = None  # it makes it when it is called, so perhaps not yet, or only since
            if f"{collator_name}.generator" in states:
                collator.create_rng()
    for name, generator in _found(roots).items():
        if name in states:
            _set_state_of(generator, states[name])


def _is_generator(value: Any) -> bool:
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    return isinstance(value, kinds) and not (isinstance(value, torch.Generator) and value.device.type != "cpu")


def _makes_its_generator(value: Any) -> bool:
    """Whether this makes its generator when it is called, as transformers' collators with a seed do."""
    own = getattr(value, "__dict__", {})
    return own.get("seed") is not None and "generator" in own and hasattr(value, "create_rng")


def _found(roots: Mapping[str, Any], wanted: Callable[[Any], bool] = _is_generator) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def look(name: str, value: Any, deep: int) -> None:
        if id(value) in seen or isinstance(value, (Tensor, nn.Module, ModuleType, type)):
            return
        seen.add(id(value))  # what has several names has one
        if wanted(value):
            found[name] = value
        elif deep:
            for key, part in _parts(value):
                look(f"{name}.{key}", part, deep - 1)

    for name, root in roots.items():
        look(name, root, _DEEP)
    return found


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    yield from dict(getattr(value, "__dict__", {})).items()
    if isinstance(value, (list, tuple, dict)):
        if len(value) <= _MANY:
            yield from ((str(i), value[i]) for i in (value if isinstance(value, dict) else range(len(value))))
    elif isinstance(value, partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # it is empty
                continue


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().tolist()).hex()
    if isinstance(generator, random.Random):
        version, numbers, gauss = generator.getstate()
        return [version, list(numbers), gauss]
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def _set_state_of(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8, device="cpu"))
    elif isinstance(generator, random.Random):
        generator.setstate((state[0], tuple(state[1]), state[2]))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_arrays(state))
    else:
        generator.bit_generator.state = _arrays(state)


def _plain(state: Any) -> Any:
    """A NumPy generator's state with lists for arrays."""
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state


def _arrays(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _arrays(value) for key, value in state.items()}
    return np.array(state, dtype=np.uint64) if isinstance(state, list) else state
