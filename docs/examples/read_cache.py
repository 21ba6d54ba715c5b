"""Read an example of a FlowMask cache with numpy alone: python read_cache.py CACHE NUMBER"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def read_example(cache: Path, number: int) -> dict[str, Any]:
    """Latents float32 [16 f h w] raw, text float32 [tokens text_dim], masks bool [F H W], facts of the clip."""
    manifest = json.loads((cache / "manifest.json").read_text())
    row = np.load(cache / "index.npy", mmap_mode="r")[number]
    bucket = manifest["buckets"][row["bucket"]]
    frames, height, width = bucket["frames"], bucket["height"], bucket["width"]
    latent = (manifest["latent_channels"], 1 + (frames - 1) // 4, height // 8, width // 8)
    with (cache / "shards" / f"{row['shard']:06d}.tar").open("rb") as shard:

        def tensor(offset: int, shape: tuple[int, ...]) -> np.ndarray:
            shard.seek(offset)
            if manifest["dtype"] == "float32":
                return np.frombuffer(shard.read(4 * int(np.prod(shape))), "<f4").reshape(shape)
            bits = np.frombuffer(shard.read(2 * int(np.prod(shape))), "<u2")  # bfloat16: the upper half of a float32
            return (bits.astype("<u4") << 16).view("<f4").reshape(shape)

        example: dict[str, Any] = {
            name: tensor(int(row[name]), latent) for name in ("video_mean", "video_logvar", "mask_mean")
        }
        example["text"] = tensor(int(row["text"]), (int(row["text_tokens"]), manifest["text_dim"]))
        shard.seek(int(row["record"]))
        record = json.loads(shard.read(int(row["record_length"])))
    masks = record["masks"][row["mask"]]["rle"]
    example["mask"] = np.stack([decode(mask["counts"], mask["size"]) for mask in masks])
    return {**example, "record": record, "sentence": record["expressions"][row["expression"]]["text"]}


def decode(counts: str, size: list[int]) -> np.ndarray:
    """COCO's compressed run lengths as bool [H W]: runs of 0 and 1 in turn, down the columns."""
    runs: list[int] = []
    value = shift = 0
    for digit in (ord(letter) - 48 for letter in counts):
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:  # the last digit of a number
            value -= (digit & 16) and 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


if __name__ == "__main__":
    for name, found in read_example(Path(sys.argv[1]), int(sys.argv[2])).items():
        print(name, found.shape if isinstance(found, np.ndarray) else found)
