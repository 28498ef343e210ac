"""Runs as files of a few bytes a step."""

from .faults import Fault, FaultyTrajectory
from .record import Kind, Record, Setup
from .trajectory import Trajectory

__all__ = ["Fault", "FaultyTrajectory", "Kind", "Record", "Setup", "Trajectory"]
