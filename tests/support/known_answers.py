"""Numbers that may never change: the words of each line of known_answers.txt, the kind of answer first."""

from pathlib import Path

LINES = [
    line.split()
    for line in Path(__file__).with_name("known_answers.txt").read_text().splitlines()
    if not line.startswith("#")
]
