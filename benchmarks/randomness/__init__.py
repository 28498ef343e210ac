"""Statistics of the noise."""
