"""Processes that take steps together, and send each other losses alone."""
