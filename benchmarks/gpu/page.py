"""The page about a GPU: what ran on it, with a mark wherever a table of its rows belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench.document import ROOT
from ..bench.registry import Row
from .headlines import good

_DRY = "**A dry run on a processor, at toy sizes: no figure here says anything about a GPU.**\n\n"
_SECTIONS: Sequence[tuple[str, str, Sequence[str], str]] = (
    (
        "Bits",
        "gpu-bits",
        ("bits",),
        "The noise and the passes, compared bit for bit with those of the processor's kernels. The tests of the stages "
        "`matrix`, `steps` and `large-…` compare with the reference.",
    ),
    (
        "Passes",
        "gpu-passes",
        ("bandwidth",),
        "One pass over one tensor, in alternating pairs with the other ways to do it; in brackets the tenth and "
        "ninetieth hundredth. A copy of the same tensor in the same run is what memory allows.",
    ),
    ("Tuning", "gpu-tuning", ("tuning",), "What a launch could be instead, in pairs with what it is."),
    ("The host", "gpu-host", ("host",), "What handing work to the GPU takes the host, in microseconds."),
    (
        "Steps",
        "gpu-steps",
        ("step", "step-cuda"),
        "Whole steps on random tokens. *Step/forwards* is a step against its forward passes alone, *speed* against the "
        "same step done otherwise, *extra* memory what the step takes beyond the forward passes.",
    ),
    ("A step, traced", "gpu-profile", ("profile",), "The operations of one step of MeZO that take longest."),
    ("Kernels, looked into", "gpu-ncu", ("ncu-triton", "ncu-cuda"), "By Nsight Compute."),
    (
        "Weights on the processor",
        "gpu-offload",
        ("offload",),
        "A step whose weights are copied to where they are used.",
    ),
    ("The processor beside it", "gpu-passes", ("cpu",), "One thread."),
)
_FIGURES = {"bandwidth": "passes beside a copy", "roofline": "passes under the roofs", "step": "parts of a step"}


def made(machine: Row, told: Mapping[str, Any], found: Mapping[str, Sequence[Row]], folder: Path) -> str:
    """The page, its tables still empty.

    Args:
        machine: the row of what ran.
        told: of the run, as it was packed.
        found: rows by stage; a stage without a correct one has no section, but for bits.
        folder: of the page, its rows and its figures.
    """
    fine = ("ok", "nothing") if told["dry_run"] else ("ok",)
    bad = [s["name"] for s in told["stages"] if s["status"] not in fine]
    bad += [name for name in told["planned"] if name not in {s["name"] for s in told["stages"]}]
    idle = "; those with *nothing* would need a GPU" if any(s["status"] == "nothing" for s in told["stages"]) else ""
    parts = [
        f"# {machine['device_name']}\n\n",
        _DRY if told["dry_run"] else "",
        f"`make gpu` on {told['began_utc'][:10]}, commit {told['commit'] or 'unknown'}; made by "
        "`python -m benchmarks gpu --read gpu.tgz` of the rows beside this page.\n\n",
        _table("gpu-machine", ["machine"], folder),
        "\n## Stages\n\n",
        f"Not as they should: {', '.join(bad)}.\n\n"
        if bad
        else f"Every stage that was asked for ran to its end{idle}.\n\n",
        _table("gpu-stages", ["stages"], folder),
    ]
    for heading, table, stages, text in _SECTIONS:
        # What is not equal is told in the table of bits, too; the others are of what is right.
        told_of = list if table == "gpu-bits" else good
        if here := [stage for stage in stages if told_of(found.get(stage, ()))]:
            parts.append(f"\n## {heading}\n\n{text}\n\n{_table(table, here, folder)}")
    figures = [f"![{text}]({name}.png)\n" for name, text in _FIGURES.items() if (folder / f"{name}.png").exists()]
    return "".join(parts) + ("\n## Figures\n\n" + "\n".join(figures) if figures else "")


def _table(name: str, stages: Sequence[str], folder: Path) -> str:
    inside = folder.is_relative_to(ROOT)  # a page elsewhere is nobody's but its maker's
    files = ((folder.relative_to(ROOT) if inside else folder) / f"{stage}.csv" for stage in stages)
    return f"<!-- table {name} of {', '.join(map(str, files))} -->\n<!-- end -->\n"
