"""Trajectories: runs as files of a few bytes a step, from which a replay rebuilds the weights.

- `record`: the format: one record for each step, as bytes and back
- `difference`: which two losses give a projected gradient
- `setups`: the setup records: options of the run as JSON, and the checks of each field
- `order`: the grammar: which record may come next, and which values it may have
- `trajectory`: a whole trajectory: reading, saving, appending
- `faults`: what is wrong with a file that cannot be read to its end, and what to do
- `search`: sound records after damage, and how many steps are lost
- `recorder`: a trajectory that grows with its run, in memory and in an open, locked file
- `fingerprint`: a 64-bit fingerprint of a tensor, to tell weights apart
"""

from .difference import ONE_SIDED, TWO_SIDED, Difference
from .faults import Fault, FaultyTrajectory
from .record import Kind, Record, Setup
from .trajectory import Trajectory

__all__ = ["ONE_SIDED", "TWO_SIDED", "Difference", "Fault", "FaultyTrajectory", "Kind", "Record", "Setup", "Trajectory"]
