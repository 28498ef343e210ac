"""The grammar of a trajectory: which record may come next, and which values it may have."""

from __future__ import annotations

import math
import struct

from .difference import DIFFERENCES
from .record import HEAD, LENGTH, RATE_EACH, TAKEN, Kind, Setup, Unknown, possible_flags
from .setups import check as check_setup

_HEAD_END = struct.Struct("<BBH")
_RATES = {n: struct.Struct(f"<{n}d") for n in range(1, 9)}


class Order:
    """Checks the records of a file one after the other. Only what optimizers write is allowed.

    Attributes:
        setup: the setup that holds now, None at the beginning.
        anchored: whether MeZO-SVRG has an anchor now.
    """

    def __init__(self) -> None:
        self.setup: Setup | None = None
        self.anchored = False
        self._checked = True  # whether no step has come since the last fingerprint
        self._heads: set[int] = set()  # allowed kind, flags and count, as one uint32

    def setup_comes(self, setup: Setup, steps: int, records: int) -> None:
        """Accept a setup that comes after `steps` steps in `records` records.

        Raises:
            Unknown: a field is wrong, or the setup does not fit what comes before it.
        """
        try:
            check_setup(setup)
            if self.setup is not None:
                self._check_after(self.setup, setup, steps, records)
        except (TypeError, ValueError) as error:
            raise Unknown(str(error)) from error
        self.setup, self.anchored = setup, setup.anchored
        self._heads = {LENGTH.unpack(head)[0] for kind in _kinds(setup) for head in _heads(kind, setup)}

    def _check_after(self, before: Setup, setup: Setup, steps: int, records: int) -> None:
        for name in ("method", "svrg", "estimator", "normalize"):
            if getattr(setup, name) != getattr(before, name):
                raise ValueError(f"{name}: expected {getattr(before, name)}, as before, got {getattr(setup, name)}")
        if not (setup.continues and records):
            return
        if setup.step != steps:
            raise ValueError(f"step: expected {steps}, as the earlier records count, got {setup.step}")
        if setup.mask != before.mask:
            raise ValueError(f"mask: expected {before.mask}, as before, got {setup.mask}")
        if not setup.anchored:
            return
        if not self.anchored:
            raise ValueError("anchored: expected False, since no earlier record took an anchor, got True")
        if setup.distribution != before.distribution:
            raise ValueError(
                f"distribution: expected {before.distribution}, as of the directions since the anchor, got "
                f"{setup.distribution}"
            )
        if [(w.name, w.shape, w.dtype) for w in setup.weights] != [(w.name, w.shape, w.dtype) for w in before.weights]:
            raise ValueError("weights: expected those of the setup before, which have anchors, got others")
        if len(setup.weight_decays) < len(before.weight_decays):
            raise ValueError(
                f"weight_decays: expected at least {len(before.weight_decays)}, as before, got "
                f"{len(setup.weight_decays)}"
            )

    def comes(self, kind: Kind, data: bytes | bytearray, at: int) -> None:
        """Accept the record at byte `at`, which is no setup and which `record.check` has accepted.

        Raises:
            Unknown: it may not come here, or has a value that it may not have.
        """
        setup = self.setup
        assert setup is not None
        if LENGTH.unpack_from(data, at + 4)[0] not in self._heads:
            self._refuse_head(data, at, setup)
        start = at + HEAD.size
        if kind is Kind.CHECK:
            if self._checked:
                raise Unknown("expected a step between two fingerprints of the weights, got none")
            self._checked = True
            return
        if kind is Kind.REFUSED or kind is Kind.INTERRUPTED:
            probes = LENGTH.unpack_from(data, start)[0]
            most = setup.most_probes
            if probes > most:
                raise Unknown(f"probes: expected at most {most}, with {setup.directions} directions, got {probes}")
            return
        self._checked = False
        groups = len(setup.weight_decays) if data[at + 5] & RATE_EACH else 1
        code = _RATES.get(groups) or struct.Struct(f"<{groups}d")
        for rate in code.unpack_from(data, start):
            if not 0 <= rate < math.inf:
                raise Unknown(f"rates: expected finite numbers of at least 0, got {rate}")
        if kind is Kind.ANCHOR:
            self.anchored = True
        elif kind is Kind.BETWEEN and not self.anchored:
            raise Unknown("expected a step at an anchor before the first step between anchors, got none")

    def _refuse_head(self, data: bytes | bytearray, at: int, setup: Setup) -> None:
        _, kind, flags, count = HEAD.unpack_from(data, at)
        if kind not in _kinds(setup):
            names = ", ".join(k.name for k in _kinds(setup))
            raise Unknown(f"kind: expected one of {names}, as {setup.method} writes, got {Kind(kind).name}")
        allowed = [_HEAD_END.unpack(head)[1:] for head in _heads(Kind(kind), setup)]
        expected = " or ".join(f"{flags} and {count}" for flags, count in allowed)
        raise Unknown(
            f"flags and count: expected {expected}, with {setup.directions} directions and {len(setup.weight_decays)} "
            f"parameter groups, got {flags} and {count}"
        )

    def heads(self) -> list[bytes]:
        """The heads that the next record may have, as bytes: kind, flags and count."""
        setup = self.setup
        own = [] if setup is None else [
            head
            for kind in _kinds(setup)
            if (kind is not Kind.BETWEEN or self.anchored) and (kind is not Kind.CHECK or not self._checked)
            for head in _heads(kind, setup)
        ]  # fmt: skip
        return [_HEAD_END.pack(Kind.SETUP, 0, 0), *own]


def _kinds(setup: Setup) -> tuple[Kind, ...]:
    """The kinds of records that may follow a setup, other setups aside."""
    spsa = Kind.ONE_SIDED if DIFFERENCES[setup.estimator].one_sided else Kind.STEP
    taken = (Kind.ANCHOR, Kind.BETWEEN) if setup.svrg else (spsa,)
    return (*taken, Kind.REFUSED, Kind.INTERRUPTED, Kind.CHECK)


def _heads(kind: Kind, setup: Setup) -> list[bytes]:
    if kind not in TAKEN:
        return [_HEAD_END.pack(kind, 0, 0)]
    possible = possible_flags(kind) & ~(RATE_EACH if len(setup.weight_decays) == 1 else 0)
    return [_HEAD_END.pack(kind, flags, setup.directions - 1) for flags in range(8) if not flags & ~possible]
