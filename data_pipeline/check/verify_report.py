"""The result of `flowmask cache verify`: wrong files with reasons, and the decoded masks."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.check.verify_masks import IOU_FLOOR, MaskCheck


@dataclass(frozen=True)
class Problem:
    """One wrong file and its fault; `unit` if the file belongs to one."""

    file: Path
    reason: str
    unit: int | None = None


@dataclass
class VerifyReport:
    """`ok` if no file is wrong; `not_decoded` is the reason if no mask was decoded."""

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

    def verdict(self, place: Path | str) -> str:
        """The files in one sentence; a second one if the VAE loses too much of masks with correct latents."""
        mend = f"flowmask cache repair {place}" if isinstance(place, Path) else "upload these again"
        files = "Files intact." if self.ok else f"{len(self.problems)} wrong: {mend}"
        poor = [mask.iou for mask in self.masks if not mask.reason and mask.iou < IOU_FLOOR]
        if not poor:
            return files
        counted = f"{len(poor)} of {len(self.masks)} decoded masks"
        return f"{files} Warning: {counted} have IoU < {IOU_FLOOR:g} with the truth (lowest {min(poor):.3f})."

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "shards": self.shards,
            "records": self.records,
            "examples": self.examples,
            "problems": [{"file": str(p.file), "reason": p.reason, "unit": p.unit} for p in self.problems],
            "masks": [{**asdict(mask), "file": str(mask.file)} for mask in self.masks],
            "masks_not_decoded": self.not_decoded,
            "environments": self.environments,
        }
