"""The backend in Triton: any GPU that Triton compiles for, and any CPU through Triton's interpreter.

Triton is imported when a function of this package is first called, never before.
"""

from .launch import prepare, unavailable

__all__ = ["prepare", "unavailable"]
