"""Growth of an evaluation with the number of expressions: the real code with a segmenter that computes nothing.

    python benchmarks/scale_evaluate.py expressions --sizes 10000 100000

Videos in the MeViS layout with one frame of 32x32 px, 20 expressions and 4 objects each. CPU seconds are valid on a
busy machine too; memory is the peak of a new process.
"""

import json
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import fresh, measured, part, run, table

SIDE, OBJECTS, SENTENCES = 32, 4, 20


@part("expressions")
def expressions(arguments: Namespace) -> None:
    """CPU seconds and memory of an evaluation, its report and its archive, by the number of expressions."""

    def rows() -> Iterator[Sequence[object]]:
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                fresh("write_videos", folder, size)
                found = fresh("evaluate_videos", folder)
            report = f"{found['report_mib']:.1f}"
            yield size, f"{found['cpu_s']:.0f}", f"{found['peak_mib']:.0f}", f"{found['start_mib']:.0f}", report

    table(("expressions", "CPU s", "MiB", "MiB after the imports", "MiB of the report"), rows())


def write_videos(folder: str, size: str) -> dict[str, Any]:
    import numpy as np
    from PIL import Image
    from pycocotools import mask as rle

    root, frame = Path(folder, "data", "valid_u"), Image.new("RGB", (SIDE, SIDE), (90, 120, 60))
    masks: dict[str, list[Any]] = {}
    for anno in range(OBJECTS):
        area = np.zeros((SIDE, SIDE), np.uint8, order="F")
        area[4 * anno : 4 * anno + 8, 4:20] = 1
        code = rle.encode(area)
        masks[str(anno)] = [{"size": code["size"], "counts": code["counts"].decode()}]
    videos: dict[str, Any] = {}
    for number in range(int(size) // SENTENCES):
        name = f"video_{number:06d}"
        (root / "JPEGImages" / name).mkdir(parents=True)
        frame.save(root / "JPEGImages" / name / "00000.jpg")
        said = {
            str(n): {"exp": f"thing {n} of {number}", "obj_id": [n % OBJECTS], "anno_id": [n % OBJECTS]}
            for n in range(SENTENCES)
        }
        videos[name] = {"frames": ["00000"], "expressions": said}
    (root / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    (root / "mask_dict.json").write_text(json.dumps(masks))
    return {}


@dataclass
class Stub:
    """Stands in for `LoadedSegmenter`: the upper half is the answer to every sentence."""

    box: Any
    pixel_norm: str = "half"
    presence: None = None
    weights: dict[str, str] = field(default_factory=lambda: {"dit": "0" * 64})
    wan_files: str = ""
    assumed: dict[str, Any] = field(default_factory=dict)
    conventions: dict[str, Any] = field(default_factory=dict)

    def unlike_training(self, _: Any) -> str:
        return ""

    def encode(self, clip: Any) -> Any:
        return clip

    def logits(self, clip: Any, sentences: Sequence[str]) -> Iterator[Any]:
        import torch

        for _ in sentences:
            logits = torch.ones(1, SIDE, SIDE)
            logits[:, SIDE // 2 :] = -1
            yield logits


def evaluate_videos(folder: str) -> dict[str, Any]:
    from flowmask.data_pipeline.config import FrameBox
    from flowmask.trainer.score import evaluate as score
    from flowmask.trainer.score.evaluate_config import EvaluateConfig

    stub = Stub(FrameBox(height_px=SIDE, width_px=SIDE, size_multiple=16))
    score.loaded_by = lambda *_: stub  # type: ignore[assignment, return-value]
    score.source_settings = lambda _: {}
    score.trained_step = lambda _: None
    config = EvaluateConfig.model_validate(
        {
            "out": Path(folder, "out"),
            "checkpoint": "stub",
            "data": {"source": "mevis", "root": Path(folder, "data"), "split": "valid_u"},
            "box": {"height_px": SIDE, "width_px": SIDE, "size_multiple": 16},
            "device": "cpu",
        }
    )
    start = measured(lambda: None)["peak_mib"]
    found = measured(lambda: score.evaluate(config))
    assert len(json.loads((config.out / "scores.json").read_text())["per_expression"]) > 0
    return found | {"start_mib": start, "report_mib": (config.out / "report.html").stat().st_size / 2**20}


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--folder", type=Path, help="where to write; default: the place for temporary files")


if __name__ == "__main__":
    run(__doc__ or "", globals(), options)
