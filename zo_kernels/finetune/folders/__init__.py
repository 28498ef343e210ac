"""What a run writes to disk, and the rules for its folder.

run_folder  the files of a run: settings, starting head, description of the model
metrics     what is measured: steps, evaluations, the summary, and metrics.jsonl
claims      checks and locks a folder before anything is written into it
schema      reads JSON that others may have edited, checked against expected types
"""
