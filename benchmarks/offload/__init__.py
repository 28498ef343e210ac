"""The suite `offload`."""
