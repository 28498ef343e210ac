"""`python -m tests.attack`: the attacks, long; `tests/attack/test_attacks.py` makes the same ones small."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS, TESTS / "support", TESTS / "finetune"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

if __name__ == "__main__":
    from attack.cli import main

    sys.exit(main())
