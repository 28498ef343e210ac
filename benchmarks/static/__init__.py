"""The suite `static`."""
