"""Zeroth-order optimizers over the primitive."""

from .base import ZeroOrderOptimizer
from .lezo import LeZO
from .mezo import MeZO
from .mezo_svrg import MeZOSVRG
from .sparse_mezo import SparseMeZO

__all__ = ["LeZO", "MeZO", "MeZOSVRG", "SparseMeZO", "ZeroOrderOptimizer"]
