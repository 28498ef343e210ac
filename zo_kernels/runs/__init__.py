"""A run: its steps, whatever ends them, the record of them, and how to go on or replay it."""
