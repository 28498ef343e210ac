"""Notices weights that are read outside of the forward of their own module, where they are not perturbed."""
