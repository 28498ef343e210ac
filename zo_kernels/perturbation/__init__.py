"""Places: where the losses of a step are evaluated, at weights that are perturbed in place or in copies.

- `place`: the protocols of a place and of its probes
- `choice`: chooses the place, from what the user asked for and the weights
- `in_place`: moves the weights themselves, and finds closures that write to them meanwhile
- `in_forward`: runs each module on perturbed copies of its weights
- `streamed`: the same on another device than that of the weights
- `engine`: hooks the modules' forwards, and swaps copies in and out
- `owners`: which module owns which weight, and which modules share copies
- `scratch`, `slots`: the buffers of the copies, here and on another device
- `aliases`: which tensors share memory with weights or copies
- `reads`: finds weights that are read where they are not perturbed
"""
