"""The optimizers that users construct: each file has one method, and the base has what they share.

- `base`: `ZeroOrderOptimizer`, the `torch.optim` layer: arguments, `step`, saving, resuming, graphs
- `mezo`: MeZO, SPSA along a random direction
- `lezo`: LeZO, which drops transformer blocks
- `fzoo`: FZOO, one-sided estimates and steps of a length of their own
- `sparse_mezo`: Sparse-MeZO, which leaves large weights alone
- `mezo_svrg`: MeZO-SVRG, which reduces the variance by an anchor
- `find_lr`: finds a learning rate by short runs
- `blocks`: finds the transformer blocks of a module
- `streamed`, `pinned`: names that documents of earlier versions import from here
"""

from ..estimators.normalize import RMS
from ..ranks.channel import RankLost
from ..ranks.parallel import Parallel, RanksDiffer
from .base import ZeroOrderOptimizer
from .find_lr import FoundLR, TriedLR, find_lr
from .fzoo import FZOO
from .lezo import LeZO
from .mezo import MeZO
from .mezo_svrg import MeZOSVRG
from .sparse_mezo import SparseMeZO

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
    "TriedLR",
    "ZeroOrderOptimizer",
    "find_lr",
]
