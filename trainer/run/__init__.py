"""One training run: the loop, its state, its start and its end.

The only folder that connects the others; of `score` it imports only `metrics`. Code that runs between two steps
goes to `run_state`, objects that are built once go to `train`.
"""
