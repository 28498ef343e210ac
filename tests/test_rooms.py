"""Arrows between rooms run one way (docs/design.md), and no files import each other in a circle."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType

from models import block_mlp, real_loss

import zo_kernels as zo

ROOT = Path(zo.__file__).parent
GROUND = ("checks", "warn", "files", "interrupts", "layouts", "modes", "names", "spec")  # modules that rooms share
FLOORS = (
    GROUND,
    ("backends",),
    ("ops",),
    ("trajectory",),
    ("weights",),
    ("closures",),
    ("perturbation",),
    ("ranks",),
    ("estimators",),
    ("runs",),
    ("optim",),
    ("integrations", "finetune"),  # which do not know each other
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Name within the package -> file, of all but the package's own face."""
    paths = [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, wherever in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(f"{ROOT.name}.")):
            path_of = node.module.split(".") if node.module else []
            base = package[: len(package) - node.level + 1] + path_of if node.level else path_of[1:]
            for alias in node.names:
                full = ".".join([*base, alias.name])
                found.add(full if full in known else ".".join(base))
    return {module for module in found if module in known}  # the face is for users


def test_arrows_run_one_way() -> None:
    known = modules()
    wrong = []
    for name, path in known.items():
        room = name.split(".")[0]
        for other in imports(name, path, known):
            target = other.split(".")[0]
            above = FLOOR_OF[target] >= FLOOR_OF[room] and room not in GROUND
            if target != room and (above or (room in GROUND and target not in GROUND)):
                wrong.append(f"{name} imports {other}")
    assert not wrong
    assert {name.split(".")[0] for name in known} - set(FLOOR_OF) <= {"_cuda", "_native"}


def test_no_files_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {name: imports(name, path, known) - {name} for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which has the circle


def test_a_step_walks_through_few_files() -> None:
    """A warm step of MeZO in place on a CPU; docs/design.md tells it."""
    model = block_mlp(depth=2, width=4)
    opt = zo.MeZO(model, lr=1e-3)
    walked = set()

    def noted(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            walked.add(frame.f_code.co_filename)

    for _ in range(70):  # past the steps in which costly checks are due
        opt.step(lambda: real_loss(model, 0))
    sys.setprofile(noted)
    try:
        opt.step(lambda: real_loss(model, 0))
    finally:
        sys.setprofile(None)
    assert len(walked) <= 33, sorted(walked)
