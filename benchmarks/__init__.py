"""Benchmarks of zo_kernels: `python -m benchmarks SUITE`, from the root of the repository."""
