"""Everything a GPU is asked in the minutes that it is at hand: one command, and what becomes of what it brings back."""
