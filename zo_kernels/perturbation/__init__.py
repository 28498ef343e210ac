"""Where the losses of a step are evaluated: in place, in the forward, or in the forward on another device."""
