"""Runs of earlier versions, to be replayed by later ones."""
