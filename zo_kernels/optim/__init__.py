"""Zeroth-order optimizers over the primitive."""

from ..ranks.channel import RankLost
from ..ranks.parallel import Parallel, RanksDiffer
from .base import ZeroOrderOptimizer
from .lezo import LeZO
from .mezo import MeZO
from .mezo_svrg import MeZOSVRG
from .sparse_mezo import SparseMeZO

__all__ = ["LeZO", "MeZO", "MeZOSVRG", "Parallel", "RankLost", "RanksDiffer", "SparseMeZO", "ZeroOrderOptimizer"]
