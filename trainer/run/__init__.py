"""One training run: the loop, its state, its start and its end. The only folder that wires the others together."""
