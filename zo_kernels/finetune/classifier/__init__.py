"""Learning to classify texts: an encoder with a linear head.

model    the encoder and its head as one module
batches  tokenised texts and their batches
learner  the loss, the evaluation, `load_classifier`
"""
