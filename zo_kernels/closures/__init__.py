"""What the user's closure is asked for, what it returned, and what its calls tell of a run that goes wrong."""
