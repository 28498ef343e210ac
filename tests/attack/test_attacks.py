"""The attacks with few cases; `make attack` makes many (docs/reliability.md)."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

if not hasattr(os, "fork"):
    pytest.skip("they fork", allow_module_level=True)

import zo_kernels as zo
from attack import cli, damage, disks, kills, layout, mutations, registry, runs, table
from attack.workers import Pool, Result, Wrong, expect, in_child, tried

COUNTS = {
    "mutations": 80, "crafted": 80, "kills": 3, "disks": 12, "states": 40, "natives": 80, "signals": 100,
    "exceptions": 42, "exceptions-twice": 14,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_attack(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attack = registry.ATTACKS[name]
    attempt = getattr(importlib.import_module(attack.module), attack.function)

    told = tmp_path.with_suffix(".txt")  # cases clear their folder

    def all_of_them() -> None:
        """In a process of its own, which may crash."""
        wrong = []
        for case in attack.listed(COUNTS[name], 1):
            result = tried(attempt, case)
            if result.finding is not None:
                wrong.append(f"{case!r}: {result.finding}")
        told.write_text("\n".join([f"{len(wrong)} findings", *wrong[:5]]))

    status = in_child(all_of_them, 120)
    assert status == 0, f"exit {status}"
    assert told.read_text() == "0 findings"


def dies(case: int) -> Result:
    """Of a pool below."""
    if case == 1:
        os.kill(os.getpid(), 9)
    if case == 2:
        while True:
            pass
    if case == 3:
        raise ZeroDivisionError
    expect(case != 4, "as told")
    return Result("fine")


@pytest.mark.slow
def test_a_pool_survives_crashes_and_hangs() -> None:
    pool = Pool("attack.test_attacks:dies", timeout=2.0, processes=1)
    found = {case: result.outcome for case, result in pool.results(range(6))}
    assert found == {0: "fine", 1: "crashed", 2: "hung", 3: "raised", 4: "wrong", 5: "fine"}


def test_cases_are_those_of_their_seed() -> None:
    for attack in registry.ATTACKS.values():
        first, again, other = (list(attack.listed(20, seed)) for seed in (0, 0, 1))
        assert first == again
        assert first != other or attack.module == "attack.commands"


@pytest.mark.parametrize("name", runs.RUNS)
def test_the_format_is_known_without_the_code_that_is_attacked(name: str) -> None:
    known = runs.recorded(name)
    assert layout.sealed(known.parts) == known.data
    assert known.ends[-1] == len(known.data)
    assert known.attempts_within(len(known.data)) == known.run.steps == len(known.states) - 1
    assert len(zo.Trajectory.from_bytes(known.data)) == known.run.steps


def test_every_damage_happens() -> None:
    import random

    known = runs.recorded("plain")
    draw, told = random.Random(0), set()
    for _ in range(400):
        names, data = damage.damaged(draw, known.data, known.ends, runs.recorded("svrg").data)
        if data != known.data:
            told |= set(names.split(" and "))
    assert told == set(damage.CHANGES)


def test_an_attack_sees_files_that_are_cut_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `resume` did once: the longest sound beginning is kept, the rest is gone."""
    monkeypatch.chdir(tmp_path)

    def resume(self: zo.ZeroOrderOptimizer, path: Path, **options: object) -> None:
        trajectory = zo.Trajectory.load(path, recover=True)
        trajectory.save(path)
        self.step_count = trajectory.steps

    monkeypatch.setattr(zo.ZeroOrderOptimizer, "resume", resume)
    outcomes = [tried(mutations.attempt, case) for case in mutations.cases(20, 0)]
    assert sum("in silence" in str(result.finding) for result in outcomes) > 5


@pytest.mark.parametrize("lost", ["weights", "record"])
def test_an_attack_sees_steps_that_are_half_done(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attack.victims import KINDS, Victim

    victim = Victim(KINDS["in place"], tmp_path / "run.zo")
    victim.step()
    assert not victim.check("whole")
    if lost == "weights":
        with pytest.raises(Wrong, match=r"^left moved: here$"):
            next(victim.model.parameters()).data.add_(1e-3)
            victim.check_after("here")
    else:
        victim.opt.step_count += 1
        with pytest.raises(Wrong, match=r"^unrecorded: here"):
            victim.check_after("here")


def test_an_attack_sees_steps_that_a_kill_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = zo.ZeroOrderOptimizer.resume

    def forgetful(self: zo.ZeroOrderOptimizer, path: Path, **options: object) -> None:
        if path.exists() and (data := path.read_bytes()):
            path.write_bytes(data[:-1])
        whole(self, path, **options)

    kills.undisturbed("plain")
    monkeypatch.setattr(zo.ZeroOrderOptimizer, "resume", forgetful)
    outcomes = [tried(kills.attempt, ("plain", "operation", "never", seed)) for seed in range(3)]
    assert any("were on file" in str(result.finding) for result in outcomes)


def test_an_attack_sees_files_that_a_full_disk_empties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def save(self: zo.Trajectory, path: Path) -> None:
        with open(path, "wb") as file:
            os.write(file.fileno(), self.to_bytes())

    monkeypatch.setattr(zo.Trajectory, "save", save)
    outcomes = [tried(disks.attempt, ("save", number, 0)) for number in range(3)]
    assert any("the old file is gone" in str(result.finding) for result in outcomes)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["--list"]) == 0
    assert all(name in capsys.readouterr().out or name for name in registry.ATTACKS)
    with pytest.raises(SystemExit):
        cli.main(["no-such"])
    assert "expected attacks of mutations" in capsys.readouterr().err
    found = {"mutations": {"what": "files", "cases": 20000, "findings": 0, "grown_MiB": 3}}
    assert "| `mutations` | files | 20,000 | 0 | 3 MiB |" in table.of(found)


def test_the_document_has_the_counts() -> None:
    if not cli.RESULTS.exists():
        pytest.skip("no long run was committed")
    text = table.DOCUMENT.read_text(encoding="utf-8")
    assert table.updated(text, json.loads(cli.RESULTS.read_text())) == text
