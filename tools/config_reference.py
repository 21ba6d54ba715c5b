"""Write docs/config/: a page and a JSON schema for each kind of config: python tools/config_reference.py.

Run it when a test says that a page and its config sections differ.
"""

from pathlib import Path

from flowmask.launch.cli.reference import kinds, page, schema

DOCS = Path(__file__).parents[1] / "docs" / "config"


def files() -> dict[Path, str]:
    """The files of docs/config/, by path."""
    made = {DOCS / f"{name}.md": page(name, kind) for name, kind in kinds().items()}
    return made | {DOCS / f"{name}.json": schema(name, kind) for name, kind in kinds().items()}


if __name__ == "__main__":
    DOCS.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text)
