"""zo_kernels: fine-tune language models with forward passes only.

Fused kernels that regenerate Gaussian noise from a seed and apply it in place, under zeroth-order optimizers.
"""

from .ops import add_noise_, noise
from .optim import FZOO, RMS, LeZO, MeZO, MeZOSVRG, Parallel, RankLost, RanksDiffer, SparseMeZO, ZeroOrderOptimizer
from .runs.replay import replay
from .trajectory import Trajectory

__all__ = [
    "FZOO",
    "RMS",
    "LeZO",
    "MeZO",
    "MeZOSVRG",
    "Parallel",
    "RankLost",
    "RanksDiffer",
    "SparseMeZO",
    "Trajectory",
    "ZeroOrderOptimizer",
    "add_noise_",
    "noise",
    "replay",
]
__version__ = "0.1.0"
