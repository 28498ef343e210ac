"""The suite `step`."""
