"""Which tables there are: rows -> headings and lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench.registry import Row
from ..gpu.tables import TABLES as GPU_TABLES
from . import claims, noise, peers, svrg

Table = tuple[Sequence[str], list[list[str]]]
TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "passes": claims.passes,
    "lezo-step": claims.lezo_step,
    "lezo": claims.lezo,
    "sparse-mezo": claims.sparse,
    "16-bits": claims.sixteen,
    "svrg-variance": svrg.variance,
    "svrg-runs": svrg.runs,
    "peers": peers.steps,
    "peers-exactness": peers.exactness,
    "peers-loss": peers.loss,
    "moments": noise.moments,
    "correlations": noise.correlations,
    "battery": noise.battery,
    **GPU_TABLES,
}
