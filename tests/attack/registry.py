"""The attacks, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Attack:
    """One of them.

    Attributes:
        name: of it.
        module: in which `cases(count, seed)` and what tries one are; imported when it is needed.
        count: cases, of the long run.
        what: is attacked, for the table.
        function: that tries a case.
        cases: that lists them.
        timeout: seconds a case.
        limited: whether a case may not map more than 1 GiB, too.
    """

    name: str
    module: str
    count: int
    what: str
    function: str = "attempt"
    cases: str = "cases"
    timeout: float = 10.0
    limited: bool = False

    def listed(self, count: int, seed: int) -> Iterator[Any]:
        import importlib

        make: Callable[[int, int], Iterator[Any]] = getattr(importlib.import_module(self.module), self.cases)
        return make(count, seed)

    @property
    def target(self) -> str:
        return f"{self.module}:{self.function}"


ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("mutations", "attack.mutations", 20000, "trajectory files damaged, to load, replay, resume, recover"),
        Attack("crafted", "attack.crafted", 5000, "sound trajectory files that say what no run says", limited=True),
        Attack("folders", "attack.folders", 160, "files of run folders, to resume, replay and sweep", timeout=240),
        Attack("kills", "attack.kills", 100, "plain loops that resume, all methods and `sync`s, killed", timeout=240),
        Attack("run-kills", "attack.run_kills", 60, "zo-finetune and ZOTrainer, killed and resumed", timeout=600),
        Attack("disks", "attack.disks", 480, "a full disk at each operation on a trajectory's file", timeout=60),
        Attack(
            "run-disks",
            "attack.disks",
            60,
            "zo-finetune, sweeps and ZOTrainer on a disk of any size",
            function="attempt_run",
            cases="cases_of_runs",
            timeout=600,
        ),
        Attack("states", "attack.states", 4000, "states, to load_state_dict", limited=True),
        Attack("natives", "attack.natives", 4000, "tables and passes, to the native backend and to ops", limited=True),
        Attack("signals", "attack.signals", 8000, "steps, by signals and by exceptions of other threads", timeout=120),
        Attack("exceptions", "attack.exceptions", 4000, "a step, where CPython delivers exceptions"),
        Attack(
            "exceptions-twice", "attack.exceptions", 2000, "a failed step that is being restored", cases="cases_twice"
        ),
        Attack("exceptions-anywhere", "attack.exceptions", 2000, "a step, any instruction", cases="cases_anywhere"),
        Attack(
            "sanitizers",
            "attack.commands",
            1,
            "the C++, under ASan, UBSan and TSan",
            cases="cases_of_sanitizers",
            timeout=900,
        ),
        Attack("ranks", "attack.commands", 9, "ranks that disagree, die or leave", cases="cases_of_ranks", timeout=900),
    )
}
