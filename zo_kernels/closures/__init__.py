"""The user's closure: calling it, checking its losses, and reporting signs that a run goes wrong.

- `losses`: calls a closure, and checks that it returns a finite scalar
- `watch`: runs the checks below in the steps where they are due
- `randomness`: finds dropout, batch norm and batches that differ between the losses of a step
- `resolution`: finds losses that are too coarse for ε
- `first_order`: finds training loops written for gradients
"""
