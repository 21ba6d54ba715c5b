"""How many cases the drawn tests draw, as a factor, and their seed: `make test-long TRIALS=N SEED=S`.

A test file that imports one of the two is run by `make test-long` too (tests/conftest.py).
"""

import os

TRIALS = int(os.environ.get("TRIALS", "1"))
SEED = int(os.environ.get("SEED", "0"))
