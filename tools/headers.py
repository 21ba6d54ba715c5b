"""Write the results of `flowmask plan` into the heads of the bundled configs: python tools/headers.py, in any folder.

Run it when a test says that a head and its plan differ. It changes only the lines of `LABELS`.
"""

import os
import sys
import tempfile

from flowmask.launch.plan.header import LABELS, heads, lines_of


def written(text: str, lines: list[str]) -> str:
    """A config's text with these lines instead of its old ones."""
    kept: list[str] = []
    inside = placed = False
    for line in text.splitlines():
        labelled = line.removeprefix("# ").split(" ")[0] in LABELS and line.startswith("# ")
        inside = labelled or (inside and line.startswith("#  "))
        if labelled and not placed:
            kept += lines
            placed = True
        if not inside:
            kept.append(line)
    return "\n".join(kept) + "\n"


def main() -> None:
    os.chdir(tempfile.mkdtemp())  # a folder without weights and data
    for path in heads():
        text = path.read_text()
        if (new := written(text, lines_of(path))) != text:
            path.write_text(new)
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
