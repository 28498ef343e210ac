"""Writes the runs of this folder: a trajectory of each kind, and a digest of the weights that it leads to.

They were written by version 0.1.0 (`python -m tests.runs.recorded.make`) and are not to be written again: what a later
version changes by accident, in the format, in what a step draws or in how it moves weights, fails their replay. Those
that are there already are left alone, so a kind that is added here is written by itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

import zo_kernels as zo

FOLDER = Path(__file__).parent
STEPS = 7
SIGNS = {"distribution": "rademacher"}
KINDS = {
    "mezo": ("MeZO", torch.float32, {}),
    "mezo-directions": ("MeZO", torch.float32, {"directions": 3, "weight_decay": 0.1}),
    "mezo-in-forward-bf16": ("MeZO", torch.bfloat16, {"perturb": "in_forward"}),
    "mezo-nearest-fp16": ("MeZO", torch.float16, {"perturb": "in_place", "rounding": "nearest"}),
    "sparse": ("SparseMeZO", torch.float32, {"sparsity": 0.6}),
    "lezo": ("LeZO", torch.float32, {"drop": 0.5}),
    "svrg": ("MeZOSVRG", torch.float32, {"anchor_every": 3}),
    "svrg-separate-bf16": ("MeZOSVRG", torch.bfloat16, {"anchor_every": 4, "shared_direction": False}),
    "signs": ("MeZO", torch.float32, {"directions": 2, "weight_decay": 0.1, **SIGNS}),
    "signs-sparse-in-forward-bf16": ("SparseMeZO", torch.bfloat16, {"sparsity": 0.6, "perturb": "in_forward", **SIGNS}),
    "fzoo": ("FZOO", torch.float32, {"directions": 3, "weight_decay": 0.1}),
    "one-sided-rms-in-forward-bf16": (
        "MeZO",
        torch.bfloat16,
        {"estimator": "one_sided", "normalize": "rms", "directions": 2, "perturb": "in_forward"},
    ),
    "sparse-kept": ("SparseMeZO", torch.float32, {"sparsity": 0.6, "mask": "kept"}),
    "signs-svrg": ("MeZOSVRG", torch.float32, {"anchor_every": 3, "drop": 0.5, **SIGNS}),
}


def model_of(dtype: torch.dtype) -> nn.Module:
    """Weights are a function of the noise, hence the same bits everywhere."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9)) for _ in range(4))
    model = nn.ModuleDict({"embed": nn.Linear(5, 9), "blocks": blocks, "head": nn.Linear(9, 3)})
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(zo.noise(p.shape, seed=17, param_id=i) * 0.3)
    return model.to(dtype)


def digest(model: nn.Module) -> str:
    """Of the bits of all parameters, in their order."""
    flat = [p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b"".join(flat)).hexdigest()


def run(kind: str, path: Path) -> str:
    """Take the steps and record them; the digest of the last weights."""
    method, dtype, options = KINDS[kind]
    model = model_of(dtype)
    inputs = zo.noise((16, 5), seed=18, param_id=0).to(dtype)

    def closure() -> torch.Tensor:
        x = model["embed"](inputs)
        for block in model["blocks"]:
            x = x + block(x).tanh()
        return model["head"](x).float().square().mean()

    lr = {"lr": 1e-3} if method != "MeZOSVRG" else {"lr": 1e-3, "anchor_lr": 2e-3}
    opt = getattr(zo, method)(model, seed=2**63 + 5, trajectory=path, sync="never", **lr, **options)
    for i in range(STEPS):
        opt.param_groups[0]["lr"] = 1e-3 / (1 + i)
        opt.step(closure, closure) if method == "MeZOSVRG" else opt.step(closure)
    opt.state_dict()
    return digest(model)


if __name__ == "__main__":
    ends = json.loads((FOLDER / "ends.json").read_text())
    ends |= {kind: run(kind, FOLDER / f"{kind}.zo") for kind in KINDS if kind not in ends}
    (FOLDER / "ends.json").write_text(json.dumps(ends, indent=1) + "\n")
