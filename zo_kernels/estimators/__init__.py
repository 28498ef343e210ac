"""Which losses a step asks for, and what numbers it makes of them."""
