"""plan.json alone, and the names of the files next to it: `flowmask status` and `cache status` read only these.

Imports neither torch nor a source, because these commands compute nothing.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.cache.manifest import Fingerprint
from flowmask.data_pipeline.plan.cost import ViewCost
from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import unseal
from flowmask.models.stored.typed import validated

FOLDER = "plan"
SENTENCES_PER_UNIT = 256
_TEXT_UNIT = re.compile(r"text-(\d{6,18})\.safetensors")
_MOST_BYTES = 1 << 26  # of plan.json


@dataclass(frozen=True)
class PlanFile:
    """The content of plan.json without its seal."""

    fingerprint: Fingerprint
    clips: int
    texts: int
    costs: list[ViewCost]
    facts: dict[str, Any]
    files: dict[str, str]  # name -> SHA-256


def read_plan_file(path: Path) -> PlanFile:
    """A plan.json as a PlanFile; OSError, or ValueError in one line."""
    return validated(unseal(read_regular(path, limit=_MOST_BYTES)), PlanFile)


def listed_text_units(folder: Path) -> set[int]:
    """Finished units of sentences, by one listing."""
    with os.scandir(folder) as entries:
        found = [_TEXT_UNIT.fullmatch(entry.name) for entry in entries]
    return {int(match[1]) for match in found if match}


def text_unit_path(folder: Path, unit: int) -> Path:
    """The file with the embeddings of a unit of sentences."""
    return folder / f"text-{unit:06d}.safetensors"
