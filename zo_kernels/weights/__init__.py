"""The weights an optimizer trains, and how the passes of a step reach them.

- `trained`: names, ids, groups and options of the trained parameters; builds the tables
- `tables`: the weights as tables of the primitive, and passes over them
- `rows`: learning rates and other numbers of a pass, as floats or as tensors on a device
- `groups`: checks of what a user gives: parameter groups, eps, blocks
- `blocks`: transformer blocks, and which of them a step drops (LeZO)
- `masks`: thresholds of magnitude masks (Sparse-MeZO): fixed when a run begins, checked now and then
- `percentiles`: exact magnitude percentiles, without sorting
- `overflow`: limits on eps and lr |g| that keep weights finite
- `shards`: the part of a parameter that this process holds (FSDP2, tensor parallelism)
- `fingerprints`: fingerprints of whole parameters, summed over their shards
- `structure`: notices modules and parameters that were replaced
- `pinned`: pinned host memory in few large pieces, for copies to a GPU
"""
