"""Figures drawn from rows: each says which rows it can draw, and draws them."""
