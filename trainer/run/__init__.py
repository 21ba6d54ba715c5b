"""One training run: the loop, its state, its start and its end.

The only folder that wires the others together; of `score` it imports `metrics` alone. What happens between two steps
goes to `run_state`, what is built once to `train`.
"""
