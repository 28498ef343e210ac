"""Tables that users bring, and what training draws from them.

tables    reads .csv, .tsv and .jsonl, or refuses them with the line that is wrong
splits    labelled texts, split into training, development and test examples
examples  tokenised examples, drawn in random batches or read once for an evaluation
"""
