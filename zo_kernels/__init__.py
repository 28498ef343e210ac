"""zo_kernels: fine-tune language models with forward passes only.

Fused kernels that regenerate Gaussian noise from a seed and apply it in place, under zeroth-order optimizers.
"""

from .ops import add_noise_, noise
from .optim import (
    FZOO,
    RMS,
    FoundLR,
    LeZO,
    MeZO,
    MeZOSVRG,
    Parallel,
    RankLost,
    RanksDiffer,
    SparseMeZO,
    TriedLR,
    ZeroOrderOptimizer,
    find_lr,
)
from .runs.replay import replay
from .trajectory import Trajectory

__all__ = [
    "FZOO",
    "RMS",
    "FoundLR",
    "LeZO",
    "MeZO",
    "MeZOSVRG",
    "Parallel",
    "RankLost",
    "RanksDiffer",
    "SparseMeZO",
    "Trajectory",
    "TriedLR",
    "ZeroOrderOptimizer",
    "add_noise_",
    "find_lr",
    "noise",
    "replay",
]
__version__ = "0.1.0"
