"""The files of a calibrated evaluation that a reader of its threshold needs, and a dataset to calibrate on."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from golden_export import DATA

from flowmask.models.config import SamplerConfig
from flowmask.trainer.predict.inference import LoadedSegmenter
from flowmask.trainer.predict.presence import RULE, Calibration, Presence


def write_threshold(out: Path, loaded: LoadedSegmenter, threshold: float) -> Path:
    """Write `out`/scores.json with a threshold for these weights, one Euler step and their box; return `out`."""
    chosen = Presence(
        rule=RULE,
        threshold=threshold,
        weights=loaded.weights,
        conventions=loaded.conventions,
        sampler=SamplerConfig(),
        box=loaded.box,
        calibration=Calibration(source="mevis", split="train", sentences=9, no_target=3, n_acc=100, t_acc=50),
    )
    out.mkdir()
    (out / "scores.json").write_text(json.dumps({"presence": chosen.model_dump(mode="json")}))
    return out


def write_some_naming_nothing(root: Path, videos: Mapping[str, str], texts: Sequence[str]) -> Path:
    """MeViS `valid_u` in `root`: the recorded videos under other ids; every second sentence of each names nothing.

    videos: new id -> recorded id; each has all `texts`
    """
    meta = json.loads((DATA / "valid_u" / "meta_expressions.json").read_text())["videos"]
    made = {}
    for name, recorded in videos.items():
        shutil.copytree(DATA / "valid_u/JPEGImages" / recorded, root / "valid_u/JPEGImages" / name)
        some = next(iter(meta[recorded]["expressions"].values()))
        entries = {
            str(number): {**some, "exp": text, "anno_id": [] if number % 2 else some["anno_id"]}
            for number, text in enumerate(texts)
        }
        made[name] = {"frames": meta[recorded]["frames"], "expressions": entries}
    (root / "valid_u/meta_expressions.json").write_text(json.dumps({"videos": made}))
    shutil.copy(DATA / "valid_u" / "mask_dict.json", root / "valid_u")
    return root
