"""Caches of random numbers for benchmarks, in the real format, by the real writers: no dataset, no encoders.

Latents have the size of a clip of 17x480x832. Nothing is checked or refused: it is not part of the library.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmask.data_pipeline.build.records import example_rows
from flowmask.data_pipeline.cache import index, manifest
from flowmask.data_pipeline.cache.manifest import BucketEntry, Fingerprint, IndexEntry, Manifest, ShardEntry
from flowmask.data_pipeline.cache.shards import FOLDER, ShardWriter, cache_file, shard_name, write_file
from flowmask.models.files import sha256_of
from flowmask.models.vae import LatentStats

LATENT = (16, 5, 60, 104)
SHAPE = (17, 480, 832)
TOKENS, TEXT_DIM = 15, 4096
MASKS, SENTENCES = 2, 3
CLIPS_PER_SHARD = 24


def write_cache(
    folder: Path,
    *,
    clips: int,
    latent: tuple[int, ...] = LATENT,
    shape: tuple[int, int, int] = SHAPE,
    text_dim: int = TEXT_DIM,
    masks: int = MASKS,
    sentences: int = SENTENCES,
    stats: LatentStats | None = None,
) -> None:
    """A whole cache of `clips` records, by default 4.4 MB each.

    stats: of the latents of the VAE in whose name the cache is written
    """
    (folder / FOLDER).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    rows, shards = [], []
    for unit, first in enumerate(range(0, clips, CLIPS_PER_SHARD)):
        path = folder / FOLDER / shard_name(unit)
        records = range(first, min(first + CLIPS_PER_SHARD, clips))
        with cache_file(path) as file:
            writer = ShardWriter(file)
            for clip in records:
                size_of = {"latent": latent, "shape": shape, "text_dim": text_dim}
                meta, tensors = _record(clip, generator, masks=masks, sentences=sentences, **size_of)
                place = writer.add(f"{clip:08d}_00", meta=meta, tensors=tensors)
                rows += example_rows(meta, tensors, place, unit=unit, shape=0)
            size, sha256 = writer.close()
        shards.append(ShardEntry(file=path.name, size=size, sha256=sha256, records=len(records), made_with=0))
    table = np.zeros(len(rows), index.ROW)
    for place, (_, *values) in enumerate(rows):
        for name, value in zip(index.COLUMNS, values, strict=True):
            table[name][place] = value
    np.save(folder / index.FILE, table)
    _write_manifest(folder, shards, clips=clips, examples=[len(rows)], shape=shape, text_dim=text_dim, stats=stats)


def _record(
    clip: int,
    generator: torch.Generator,
    *,
    latent: tuple[int, ...],
    shape: tuple[int, int, int],
    text_dim: int,
    masks: int,
    sentences: int,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).bfloat16()

    tensors = {"video.mean": random(*latent), "video.logvar": random(*latent)}
    tensors |= {f"mask.{j}.mean": random(*latent) for j in range(masks)}
    tensors |= {f"text.{k}": random(TOKENS, text_dim) for k in range(sentences)}
    expressions = [
        {"exp_id": str(k), "text": f"the thing number {k}", "mask": k % masks, "text_id": k} for k in range(sentences)
    ]
    meta = {
        "video_id": f"video {clip}",
        "frame_ids": list(range(shape[0])),
        "view": 0,
        "size": [shape[2], shape[1]],
        "masks": [],
        "expressions": expressions,
    }
    return meta, tensors


def write_large_cache(folder: Path, *, shards: int, examples: int, buckets: int = 4) -> None:
    """A cache of holes: full index and manifest, shards of the right size (30 MB) that take no space on the disk."""
    (folder / FOLDER).mkdir(parents=True)
    size, latent = 30_000_000, 2 * int(np.prod(LATENT))
    entries = []
    for unit in range(shards):
        with (folder / FOLDER / shard_name(unit)).open("wb") as file:
            file.truncate(size)
        digest = hashlib.sha256(str(unit).encode()).hexdigest()
        entries.append(ShardEntry(file=shard_name(unit), size=size, sha256=digest, records=64, made_with=0))
    table = np.lib.format.open_memmap(folder / index.FILE, mode="w+", dtype=index.ROW, shape=(examples,))
    for start in range(0, examples, 1 << 20):
        part = table[start : start + (1 << 20)]
        number = np.arange(start, start + len(part))
        part["shard"] = number * shards // examples
        part["bucket"] = number * buckets // examples
        for place, name in enumerate(("video_mean", "video_logvar", "mask_mean", "text")):
            part[name] = 512 + (number % 20) * 1_000_000 + place * latent
        part["text_tokens"] = TOKENS
    table.flush()
    counts = np.bincount(np.arange(0, examples) * buckets // examples, minlength=buckets).tolist()
    _write_manifest(folder, entries, clips=shards * 64, examples=counts)


def _write_manifest(
    folder: Path,
    shards: list[ShardEntry],
    *,
    clips: int,
    examples: list[int],
    shape: tuple[int, int, int] = SHAPE,
    text_dim: int = TEXT_DIM,
    stats: LatentStats | None = None,
) -> None:
    known = stats or LatentStats((0.0,) * LATENT[0], (1.0,) * LATENT[0])
    frames, height, width = shape
    buckets = [
        # readers need only the shape; in a real cache, equal shapes would be one bucket
        BucketEntry(frames=frames, height=height, width=width, first=[sum(examples[:b])], examples=[count])
        for b, count in enumerate(examples)
    ]
    path = folder / index.FILE
    facts = Manifest(
        fingerprint=Fingerprint(total="0" * 64, text="0" * 64, video="0" * 64, masks="0" * 64, fields={}),
        dtype="bfloat16",
        views=1,
        latent_channels=LATENT[0],
        latents_mean=list(known.mean),
        latents_std=list(known.std),
        text_dim=text_dim,
        longest_text_tokens=TOKENS,
        pixel_norm="half",
        lowercase=True,
        clips=clips,
        examples=sum(examples),
        dropped_empty_masks=0,
        buckets=buckets,
        index=IndexEntry(size=path.stat().st_size, sha256=sha256_of(path)),
        environments=[{}],
        shards=shards,
    )
    write_file(folder / manifest.FILE, facts.to_bytes())
