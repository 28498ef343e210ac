"""Several runs over learning rates and perturbation scales.

plan   which runs there are, and their results on disk
sweep  does the runs and picks the best (`zo-finetune sweep`)
"""
