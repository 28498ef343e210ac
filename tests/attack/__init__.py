"""Attacks on what the package promises (docs/reliability.md): `python -m tests.attack --help`."""
