"""Learning a task with prompts, by the own head of a causal or masked language model.

task_data       rows of a data set, from the hub or from files
render          a row as the token ids of its prompt
causal, masked  batches of prompts, and the scores of candidate answers
answers         exact match and F1 of generated answers
language_model  loads models and tokenizers
predictor       a model with its prompts: `predict`, `load_prompted`
learner         the loss, the objective, the evaluation
"""
