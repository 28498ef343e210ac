"""The suite `profile`."""
