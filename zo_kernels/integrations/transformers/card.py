"""The optimizer's entry in a model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from zo_kernels import ZeroOrderOptimizer
from zo_kernels.integrations.transformers.resumed import kept_by_state

_PAPERS = {
    "MeZO": "2305.17333",
    "SparseMeZO": "2402.15751",
    "LeZO": "2410.09823",
    "MeZOSVRG": "2404.08080",
    "FZOO": "2506.09034",
}
_HEADING = "### Zeroth-order optimization"
_OPTIMIZER = re.compile(r"^- optimizer: .*(\n(?![-\n#]).*)*", re.MULTILINE)


def tell_of(optimizer: ZeroOrderOptimizer, objective: str, path: Path) -> None:
    """Name the method and its options in a card that a Trainer wrote, in place of the optimizer of its arguments."""
    text = path.read_text(encoding="utf-8")
    told = described(optimizer)
    text, named = _OPTIMIZER.subn(lambda _: f"- optimizer: {told}", text)
    if not named and _HEADING not in text:  # such as cards of TRL
        text = f"{text.rstrip()}\n\n{_HEADING}\n\n- optimizer: {told}\n"
    if objective != "loss" and "- objective: " not in text:
        text = text.replace(f"- optimizer: {told}", f"- optimizer: {told}\n- objective: {objective}")
    path.write_text(text, encoding="utf-8")


def described(optimizer: ZeroOrderOptimizer) -> str:
    """One line of Markdown: the method, its paper, and its options but those that are off."""
    name = type(optimizer).__name__
    options: dict[str, Any] = kept_by_state(optimizer)
    options["seed"] = options.pop("zo_seed")
    told = [f"{option}={value}" for option, value in options.items() if value not in (None, 0, 0.0, [], "none")]
    told += [f"perturb={optimizer.perturb}", f"rounding={optimizer.rounding}"]
    paper = f" ([arXiv {_PAPERS[name]}](https://arxiv.org/abs/{_PAPERS[name]}))" if name in _PAPERS else ""
    return f"{name} of zo_kernels{paper}, zeroth-order: forward passes only, without gradients; {', '.join(told)}"
