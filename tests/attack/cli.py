"""The command line: attacks one after the other, a line of progress for each, and the counts as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attack.registry import ATTACKS, Attack
from attack.workers import Pool

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "attack.json"
_TOLD = 20  # findings of an attack that are kept


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser("python -m tests.attack", description=__doc__)
    result.add_argument("names", nargs="*", metavar="NAME", help=f"attacks; by default all of {', '.join(ATTACKS)}")
    result.add_argument("--scale", type=float, default=1.0, help="of every count (default 1)")
    result.add_argument("--count", type=int, help="cases of each attack, instead of its own")
    result.add_argument("--seed", type=int, default=0, help="of the cases (default 0)")
    result.add_argument("--processes", type=int, default=2, help="that try them (default 2)")
    result.add_argument("--out", type=Path, default=Path("runs/attack.json"), help="counts (default %(default)s)")
    result.add_argument("--list", action="store_true", help="list the attacks")
    result.add_argument("--table", action="store_true", help=f"print the table of {RESULTS.relative_to(ROOT)}")
    result.add_argument("--write-table", action="store_true", help="and write it into docs/reliability.md")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Exits with 1 if there is a finding."""
    from attack import table

    command = parser()
    options = command.parse_args(arguments)
    if unknown := [name for name in options.names if name not in ATTACKS]:
        command.error(f"expected attacks of {', '.join(ATTACKS)}, got {', '.join(unknown)}")
    if options.list:
        print("\n".join(f"{a.name:16} {a.count:6}  {a.what}" for a in ATTACKS.values()))
        return 0
    if options.table or options.write_table:
        print(table.of(json.loads(RESULTS.read_text())))
        return table.write(RESULTS) if options.write_table else 0
    found: dict[str, Any] = {}
    if options.out.exists():
        found = json.loads(options.out.read_text())  # of attacks that are not repeated
    wrong = 0
    for name in options.names or ATTACKS:
        attack = ATTACKS[name]
        count = options.count or max(1, round(attack.count * options.scale))
        found[name] = run(attack, count, options.seed, options.processes)
        wrong += found[name]["findings"] or 0
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({k: found[k] for k in sorted(found)}, indent=1) + "\n")
    print(f"{wrong} findings; counts: {options.out}")
    return int(wrong > 0)


def run(attack: Attack, count: int, seed: int, processes: int = 2, *, quiet: bool = False) -> dict[str, Any]:
    """The counts of an attack."""
    pool = Pool(attack.target, attack.timeout, processes, attack.limited)
    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    tally: Counter[str] = Counter()
    told: list[str] = []
    started = last = time.monotonic()
    done = 0
    for case, result in pool.results(attack.listed(count, seed)):
        done += 1
        outcomes[result.outcome] += 1
        tally.update(result.tally)
        if result.finding is not None:
            kinds[result.finding[:60]] += 1
            if len(told) < _TOLD and kinds[result.finding[:60]] <= 3:
                told.append(f"{case!r}: {result.finding}"[:1500])
                if not quiet:
                    print(f"    {told[-1]}", flush=True)
        if not quiet and time.monotonic() - last > 1 and sys.stdout.isatty():
            last = time.monotonic()
            print(f"\r{attack.name}: {done} of {count}, {sum(kinds.values())} findings", end="", flush=True)
    seconds = time.monotonic() - started
    findings = sum(kinds.values())
    if not quiet:
        clear = "\r" if sys.stdout.isatty() else ""
        told_of = ", ".join(f"{n} {what}" for what, n in [*tally.items(), *outcomes.most_common(8)])
        print(f"{clear}{attack.name}: {done} cases in {seconds:.0f} s, {findings} findings; {told_of}", flush=True)
    return {
        "cases": done,
        "findings": findings,
        "outcomes": dict(outcomes.most_common()),
        **({"tally": dict(tally)} if tally else {}),
        "seed": seed,
        "seconds": round(seconds),
        "grown_MiB": round(pool.grown / 2**20),
        "told": told,
        "what": attack.what,
        "python": platform.python_version(),
    }
