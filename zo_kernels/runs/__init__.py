"""A run: its steps, the exceptions that may end them, its record, and how to save, resume and replay it.

- `run`: `Run`, which counts and records steps, and knows whether the weights are those of a step
- `attempt`: one step at a time; whatever exception comes, the step is whole or the weights are restored
- `recording`: writes a run to its trajectory, and notices weights that something else changed
- `state`: `state_dict` and `load_state_dict`
- `resuming`: continues a run from its trajectory
- `replay`: rebuilds weights from a trajectory
- `graphed`: steps as a CUDA graph
- `operations`: lists of PyTorch operations, to compare a captured closure with an ordinary one
"""
