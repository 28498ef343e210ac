"""`gpu`: a stage fails alone, what was found is packed after each, and what is not right is told."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace

import pytest

from benchmarks.__main__ import main
from benchmarks.bench import rows as benchmark_rows
from benchmarks.gpu import build, plan, process
from benchmarks.gpu.plan import FOLDER, Stage


class Made(Stage):
    """A stage of some code, that may write rows as a suite does."""

    @property
    def suite(self):
        return "kernels" if ".json" in " ".join(self.command) else None


def stage(name, code, limit=30.0, expected=1.0, **more):
    return Made(name, ("-c", code), limit, expected, **more)


def rows(name, **row):
    """What writes a row as a suite does."""
    return f"import json; open('{FOLDER}/{name}.json', 'w').write(json.dumps([{dict({'case': name}, **row)!r}]))"


FINE = stage("fine", rows("fine", correct=True))


def told(out):
    with tarfile.open(out / "gpu.tgz") as tar:
        return json.load(tar.extractfile("run.json")), set(tar.getnames())


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs made-up stages: the exit status, how they ended, and the files that were packed."""

    def go(*stages, options=("--dry-run",)):
        monkeypatch.setattr(plan, "stages", lambda sizes: list(stages))
        status = main(["gpu", "--out", str(tmp_path), *options])
        found, names = told(tmp_path)
        assert os.listdir(tmp_path) == ["gpu.tgz"]
        return status, {s["name"]: s for s in found["stages"]}, names

    return go


def test_a_stage_that_crashes_costs_itself_alone(run, capsys):
    crash = "import os; print('last words', flush=True); os.abort()"
    status, ended, names = run(stage("crashes", crash), FINE)
    assert status == 3 and ended["fine"]["status"] == "ok"
    assert ended["crashes"]["status"] == "failed"
    assert ended["crashes"]["lines"] == [f"exit status {-signal.SIGABRT}", "last words"]
    assert names == {"run.json", "crashes.txt", "fine.txt", "fine.json"}
    assert "   last words\n" in capsys.readouterr().out


HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(300)
"""


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stage_that_hangs_is_killed_with_its_children(run, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(process, "TO_WRITE_SECONDS", 0.2)
    file = tmp_path_factory.mktemp("child") / "pid"
    hangs = Stage("hangs", ("-c", HANGS, str(file)), limit=1.0, expected=1.0)
    start = time.monotonic()
    status, ended, _ = run(hangs, FINE)
    assert time.monotonic() - start < 20 and status == 3
    assert ended["hangs"]["status"] == "cut" and ended["fine"]["status"] == "ok"
    child = int(file.read_text())
    for _ in range(100):
        if not running(child):
            break
        time.sleep(0.02)
    assert not running(child)


def test_a_child_that_outlives_its_stage_is_killed(run, tmp_path_factory):
    file = tmp_path_factory.mktemp("child") / "pid"
    leaves = HANGS.rpartition("time.sleep(300)")[0]
    status, ended, _ = run(Stage("leaves", ("-c", leaves, str(file)), 30.0, 1.0))
    assert status == 0 and ended["leaves"]["status"] == "ok"
    for _ in range(100):
        if not running(int(file.read_text())):
            break
        time.sleep(0.02)
    assert not running(int(file.read_text()))


def test_what_a_stopped_stage_has_written_is_kept(run):
    code = f"import time\ntry: time.sleep(300)\nexcept KeyboardInterrupt: {rows('slow', correct=True)}"
    status, ended, names = run(stage("slow", code, limit=1.0))
    assert status == 3 and ended["slow"]["status"] == "cut" and "slow.json" in names


def test_wrong_rows_are_told_before_all_else(run, capsys):
    wrong = stage("wrong", rows("wrong", correct=False, wrong="3 elements differ") + "; exit(1)")
    status, ended, _ = run(wrong, stage("crashes", "exit(7)"))
    assert status == 1 and ended["wrong"]["lines"] == ["WRONG wrong: 3 elements differ"]
    assert "\nwrong    wrong " in capsys.readouterr().out


def test_tests_that_fail_are_wrong_results(run, tmp_path_factory):
    file = tmp_path_factory.mktemp("tests") / "test_here.py"
    file.write_text("def test_a(): assert 0\ndef test_b(): pass\n")
    (steps,) = (made for made in plan.stages(plan.toy()) if made.name == "steps")
    ours = {"tests/optim/test_gpu_steps.py": str(file), "test_launches_of_a_step": "test"}
    command = [ours.get(part, part) for part in steps.command]
    status, ended, _ = run(Stage("tests", tuple(command), 60.0, 1.0))
    summary, failed = ended["tests"]["lines"]
    assert status == 1 and ended["tests"]["status"] == "wrong"
    assert summary.startswith("1 failed, 1 passed") and "test_here.py::test_a" in failed


@pytest.mark.parametrize(
    ("printed", "exit_status", "status", "lines"),
    [
        (
            "SKIPPED [2] tests/a.py:84: needs a GPU\n2 skipped, 83 deselected in 0.82s",
            *(0, "nothing", ["2 skipped, 83 deselected in 0.82s", "SKIPPED [2] tests/a.py:84: needs a GPU"]),
        ),
        ("..\n2 passed in 61.00s (0:01:01)\nleaked", 0, "ok", ["2 passed in 61.00s (0:01:01)"]),
        (
            "ERROR tests/a.py - ImportError: no\n1 error in 0.1s",
            *(2, "failed", ["exit status 2", "ERROR tests/a.py - ImportError: no", "1 error in 0.1s"]),
        ),
    ],
)
def test_what_pytest_prints_is_read(run, printed, exit_status, status, lines):
    class Tests(Stage):
        is_tests = True

    (ended,) = run(Tests("tests", ("-c", f"print({printed!r}); exit({exit_status})"), 30.0, 1.0))[1].values()
    assert (ended["status"], ended["lines"]) == (status, lines)


def test_no_stage_is_begun_that_the_time_left_is_not_enough_for(run):
    long = stage("long", "print('never')", expected=100.0)
    status, ended, names = run(long, FINE, options=("--dry-run", "--seconds", "30"))
    assert status == 3 and ended["long"]["status"] == "late" and ended["fine"]["status"] == "ok"
    assert "long.txt" not in names and "about 100 are needed" in ended["long"]["lines"][0]
    assert ended["fine"]["limit"] <= 22


def test_without_what_is_vital_nothing_else_is_run(run, capsys):
    vital = stage("machine", rows("machine", skipped="PyTorch sees no GPU here"), vital=True)
    status, ended, _ = run(vital, FINE, options=())
    assert status == 3 and list(ended) == ["machine"] and ended["machine"]["status"] == "nothing"
    out = capsys.readouterr().out
    assert "PyTorch sees no GPU here" in out and "not begun" in out


def test_stages_without_a_case_to_run_fail_where_there_is_a_gpu(run):
    skipped = stage("skipped", rows("skipped", skipped="no nvcc"))
    empty = "print('no case of kernels matches'); exit(2)"
    assert run(skipped)[0] == 0 and run(skipped, options=())[0] == 3
    assert run(stage("empty", empty))[0] == 3
    silent = stage("silent", "'no .json'")
    status, ended, _ = run(silent)
    assert status == 3 and ended["silent"]["lines"] == ["it has written no rows"]


def test_stages_are_chosen_by_name(run):
    status, ended, _ = run(stage("machine", "", vital=True), FINE, options=("--dry-run", "--only", "^x"))
    assert status == 0 and list(ended) == ["machine"]


@pytest.mark.parametrize("dry", [True, False])
def test_stages_know_the_code_and_whether_the_run_is_dry(run, tmp_path, monkeypatch, dry):
    names = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", benchmark_rows.COMMIT)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(benchmark_rows, "commit", lambda: None)  # a copy without a history
    code = f"import os; print(*(repr(os.environ.get(name)) for name in {names!r}))"
    options = ("--commit", "abc", *(["--dry-run"] if dry else []))
    run(stage("tells", code), options=options)
    with tarfile.open(tmp_path / "gpu.tgz") as tar:
        printed = tar.extractfile("tells.txt").read().decode()
    assert printed == ("'' '1' 'abc'\n" if dry else "None None 'abc'\n")
    assert told(tmp_path)[0]["commit"] == "abc" and told(tmp_path)[0]["dry_run"] is dry


@pytest.mark.parametrize("git", ["is not there", "says nothing"])
def test_where_git_cannot_tell_the_environment_does(monkeypatch, git):
    def refuse(*arguments, **options):
        if git == "is not there":
            raise FileNotFoundError
        return Namespace(stdout="")

    monkeypatch.setattr(benchmark_rows.subprocess, "run", refuse)
    monkeypatch.delenv(benchmark_rows.COMMIT, raising=False)
    assert benchmark_rows.commit() is None
    monkeypatch.setenv(benchmark_rows.COMMIT, "abc")
    assert benchmark_rows.commit() == "abc"


RUNNER = """
import sys
from benchmarks.__main__ import main
from benchmarks.gpu import plan
plan.stages = lambda sizes: [plan.Stage(name, ("-c", code), 30.0, 1.0) for name, code in {stages!r}]
sys.exit(main(["gpu", "--dry-run", "--out", sys.argv[1]]))
"""


def killed(tmp_path, number):
    """A run that its second stage kills."""
    kill = f"import os, time; os.kill(os.getppid(), {int(number)}); time.sleep(20)"
    code = RUNNER.format(stages=[("fine", rows("fine", correct=True)), ("kills", kill), ("never", "")])
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, str(out)]
    return subprocess.run(command, cwd=process.ROOT, capture_output=True, text=True, timeout=60), out


def test_what_was_found_survives_that_the_run_is_killed(tmp_path):
    done, out = killed(tmp_path, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    found, names = told(out)
    assert [(s["name"], s["status"]) for s in found["stages"]] == [("fine", "ok")]
    assert names == {"run.json", "fine.txt", "fine.json"} and found["planned"] == ["fine", "kills", "never"]


def test_a_run_that_is_told_to_end_shows_what_it_has(tmp_path):
    done, out = killed(tmp_path, signal.SIGTERM)
    assert done.returncode == 3 and "never" in done.stdout.partition("interrupted")[2]
    found, _ = told(out)
    assert [(s["name"], s["status"]) for s in found["stages"]] == [("fine", "ok"), ("kills", "cut")]


def test_a_run_needs_a_place_for_what_it_finds(capsys):
    assert main(["gpu", "--dry-run"]) == 2 and "expected --out FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("left", [None, "no such device"])
def test_what_is_missing_is_built(monkeypatch, capsys, left):
    reasons = {"_native": [None, None], "_cuda": ["not there", left]}
    ran = []

    def compile(command, cwd, env):
        ran.append((command[1:], env["ZO_KERNELS_NATIVE"], env["ZO_KERNELS_CUDA"]))
        return Namespace(returncode=0)

    monkeypatch.setattr(build, "missing", lambda extension: reasons[extension].pop(0))
    monkeypatch.setattr(build.subprocess, "run", compile)
    monkeypatch.setenv("ZO_KERNELS_CUDA", "0")  # as the Makefile has it
    assert build.main(["_native", "_cuda"]) == int(left is not None)
    assert ran == [(["setup.py", "build_ext", "--inplace", "--force"], "0", "1")]
    out = capsys.readouterr().out
    assert "_cuda: not there" in out and (left is None or f"_cuda was built, but: {left}" in out)
