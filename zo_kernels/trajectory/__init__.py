"""Runs as files of a few bytes a step."""

from .record import Kind, Record, Setup
from .trajectory import Trajectory

__all__ = ["Kind", "Record", "Setup", "Trajectory"]
