"""One run from start to end.

job       everything that is made before the first step
steps     one step of the optimizer, timed
train     the training loop: starts a run or resumes one
stopping  when to stop a run early
report    curves, opening lines, closing table
rebuild   the weights after any step (`zo-finetune replay`)
"""
