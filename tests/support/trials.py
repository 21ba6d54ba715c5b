"""How many cases the drawn tests draw, as a factor, and their seed: `make test-long TRIALS=N SEED=S`.

`make test-long` also runs each short test that uses one of the two (tests/conftest.py).
"""

import ast
import os
from functools import cache
from pathlib import Path

TRIALS = int(os.environ.get("TRIALS", "1"))
SEED = int(os.environ.get("SEED", "0"))


@cache
def drawn_tests(path: Path) -> frozenset[str]:
    """The functions of a test file that use TRIALS or SEED: themselves, in a decorator, or by what they name."""
    names = dict[str, set[str]]()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                defined = [name]
            case ast.Assign(targets=targets):
                defined = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                defined = [name]
            case _:
                continue
        used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        used |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}  # fixtures
        names |= dict.fromkeys(defined, used)
    found = {"TRIALS", "SEED"}
    while more := {name for name, used in names.items() if used & found} - found:
        found |= more
    return frozenset(found)
