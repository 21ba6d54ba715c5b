"""`python -m flowmask` is `flowmask`."""

import os
import sys

if __name__ == "__main__":
    # -m puts the working folder first, where a file `yaml.py` would be taken for the library; this package is found.
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109
        del sys.path[0]
    from flowmask.launch.cli.main import command

    command()
