"""Processes that take steps together. They send each other losses, never weights.

- `parallel`: `Parallel`, the user's options, and `Ranks`, which deals out work, exchanges losses and compares weights
- `channel`: messages between the ranks of a process group, with a time limit
- `messages`: texts and errors that ranks exchange, and what is said about ranks that differ
"""
