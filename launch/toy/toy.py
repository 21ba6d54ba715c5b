"""`flowmask toy`: the folder of a toy. Existing parts are kept, so the same command continues; same seed, same bytes.

    DIR/wan  DIR/data/DATASET  DIR/example.mp4  DIR/try.yaml    and later DIR/caches  DIR/runs  DIR/out

Refuses a folder that is not a toy's, and a toy of another seed.
"""

import importlib.util
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

from flowmask.data_pipeline.randomness import mix64
from flowmask.launch.demo.demo import write_example
from flowmask.launch.demo.world import claim, write_once, write_wan
from flowmask.launch.toy import actions, pictures, videos
from flowmask.launch.toy.scenes import Scene, draw_scenes
from flowmask.models.files import write_atomically
from flowmask.models.folders.output_folder import Kind, OutputFolder

OVERLAY, EXAMPLE = "try.yaml", "example.mp4"
TOY = Kind("a toy", older=lambda out: None)  # versions before the mark wrote no toy
_MARK = "toy.json"
_TRY = """\
# Lay this over any config, so that it runs small: `flowmask train configs/train_mevis.yaml THIS_FILE`.
# KEY=VALUE behind it is stronger. Nothing that comes of it means anything as a score.
paths:                    # in configs on the left, in this folder on the right
  weights/Wan2.1-T2V-1.3B-Diffusers: wan
  datasets: data
  datasets/mevis_v2: data/mevis
  out/demo/wan: wan
  out/demo/dataset: data/mevis
  caches: caches
  runs: runs
  out: out
launch:
  processes_per_node: 1
cache:
  clip:
    short_side: 64
    long_side: 64
    crop_short_sides: [54, 64, 80]
    crop_min: 52
    crop_max: 80
train:
  train:
    steps: 8
    epochs: null
    lr: 2.0e-3
    warmup_steps: 2
    schedule: constant
    decay_at_epochs: []
    decay_at_steps: []
    micro_batch: 4
    precision: fp32        # bf16 is slow on many CPUs
  checkpoint.every_steps: 8
evaluate:
  box: {height_px: 64, width_px: 64}
  precision: fp32
study:
  seeds: 1
  seeds_of: {}
world:
  train_videos: 8
  valid_videos: 2
"""


def write_toy(out: Path, *, seed: int, say: Callable[[str], None]) -> str:
    """Write the missing parts of a toy; returns a sentence of its example. ConfigError for another folder."""
    folder = OutputFolder(out, TOY)
    with folder.held():
        claim(out / _MARK, {"seed": seed}, what="a toy")
        write_wan(out / "wan", seed=seed)
        for name, write in _datasets(seed).items():
            place = out / "data" / name
            if name == "a2d_sentences" and not place.exists() and importlib.util.find_spec("h5py") is None:
                say("data/a2d_sentences is left out, since h5py is missing: pip install 'flowmask[a2d]', then again")
                continue
            write_once(place, lambda root, name=name, write=write: write(root / name))  # type: ignore[misc]
        sentence = write_example(out / "data" / "mevis", out / EXAMPLE)[0]
        if not (out / OVERLAY).exists():
            write_atomically(out / OVERLAY, _TRY)
    return sentence


def _datasets(seed: int) -> dict[str, Callable[[Path], None]]:
    """The writer of each folder of data/, by its name in datasets/."""
    drawn = cache(lambda: list(draw_scenes(mix64(seed, 1))))  # only if a dataset is missing

    def splits(**places: slice) -> dict[str, list[Scene]]:
        return {split: drawn()[place] for split, place in places.items()}

    return {
        "mevis": lambda root: videos.write_mevis(
            root, splits(train=slice(0, 8), valid_u=slice(8, 11), valid=slice(11, 13), calibrate=slice(13, 16))
        ),
        "ref_youtube_vos": lambda root: videos.write_youtube(root, train=drawn()[16:24], valid=drawn()[24:27]),
        "ref_davis17": lambda root: videos.write_davis(root, valid=drawn()[27:29]),
        "revos": lambda root: videos.write_revos(root, valid=drawn()[29:31]),
        "long_rvos": lambda root: videos.write_long_rvos(root, valid=drawn()[31:33]),
        "refcoco": lambda root: pictures.write_refcoco(root, splits(train=slice(33, 65), val=slice(65, 73))),
        "a2d_sentences": lambda root: actions.write_a2d(root, splits(train=slice(73, 81), test=slice(81, 83))),
        "jhmdb_sentences": lambda root: actions.write_jhmdb(root, test=drawn()[83:85]),
    }


def commands(out: Path, sentence: str) -> list[str]:
    """The next commands for a person, in order; sentence: the result of `write_toy`."""
    parts = (OVERLAY, "runs/mevis", EXAMPLE, "predict")
    overlay, run, video, masks = (shlex.quote(str(out / part)) for part in parts)
    return [
        f"flowmask cache build configs/cache_mevis.yaml {overlay}",
        f"flowmask train configs/train_mask_decoder.yaml {overlay}",
        f"flowmask train configs/train_mevis.yaml {overlay}",
        f"flowmask evaluate configs/evaluate_mevis.yaml {overlay}",
        f"flowmask predict {video} {shlex.quote(sentence)} --checkpoint {run} --out {masks}",
        f"flowmask curriculum configs/curriculum_refcoco_mevis.yaml {overlay}",
    ]
