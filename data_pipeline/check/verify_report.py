"""What a verification of a cache found: the wrong files with reasons, and the masks that were decoded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.check.verify_masks import IOU_FLOOR, MaskCheck


@dataclass(frozen=True)
class Problem:
    """One wrong file, and what is wrong with it; `unit` where it belongs to one."""

    file: Path
    reason: str
    unit: int | None = None


@dataclass
class VerifyReport:
    """What a verification found; `ok` if nothing is wrong. `not_decoded` says why no mask was decoded."""

    shards: int = 0
    records: int = 0
    examples: int = 0
    problems: list[Problem] = field(default_factory=list)
    masks: list[MaskCheck] = field(default_factory=list)
    not_decoded: str = ""
    environments: list[dict[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def poor_masks(self) -> list[MaskCheck]:
        """Right latents of which the VAE shows little."""
        return [check for check in self.masks if not check.reason and check.iou < IOU_FLOOR]

    def to_json(self) -> dict[str, Any]:
        masks = [
            {"file": str(m.file), "clip": m.clip, "mask": m.mask, "iou": m.iou, "error": m.error} for m in self.masks
        ]
        return {
            "ok": self.ok,
            "shards": self.shards,
            "records": self.records,
            "examples": self.examples,
            "problems": [{"file": str(p.file), "reason": p.reason, "unit": p.unit} for p in self.problems],
            "masks": masks,
            "masks_not_decoded": self.not_decoded,
            "environments": self.environments,
        }
