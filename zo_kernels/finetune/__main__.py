"""`python -m zo_kernels.finetune` runs `zo-finetune`."""

import sys

from zo_kernels.finetune.cli import main

sys.exit(main())
