"""Zeroth-order optimizers over the primitive."""

from .base import ZeroOrderOptimizer
from .channel import RankLost
from .lezo import LeZO
from .mezo import MeZO
from .mezo_svrg import MeZOSVRG
from .parallel import Parallel, RanksDiffer
from .sparse_mezo import SparseMeZO

__all__ = ["LeZO", "MeZO", "MeZOSVRG", "Parallel", "RankLost", "RanksDiffer", "SparseMeZO", "ZeroOrderOptimizer"]
