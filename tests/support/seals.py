"""Changes a sealed JSON file as its maker can: with a valid seal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmask.models.stored.sealed import seal_readable


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the object in a file, and write a valid seal."""
    document = json.loads(path.read_text())
    document.pop("seal", None)
    change(document)
    path.write_bytes(seal_readable(document))
