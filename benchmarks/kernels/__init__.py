"""The suite `kernels`."""
