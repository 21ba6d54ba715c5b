"""Frame sampling: recorded draws (exact, since our code draws in the same order), properties, anchors."""

import functools
import re
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

from flowmask.data_pipeline.clip.frames import anchor_frames, sparse_frames
from parity.core import Check, ParitySet, near, same

TRIALS = 4000
LONGEST = 60  # longest random video; the record does not hold its limit, and the fractions depend on it a little
FRACTION_TOLERANCE = 0.05


@functools.cache
def _draws(counts: tuple[int, ...]) -> list[tuple[int, int, int, list[int]]]:
    """(anchor, length, frames, result) over random videos, with the anchors of an epoch."""
    rng = Random(0)
    drawn = []
    for _ in range(TRIALS):
        length, frames = rng.randint(1, LONGEST), rng.choice(counts)
        anchor = rng.choice(anchor_frames(length, frames))
        result = sparse_frames(rng, anchor=anchor, length=length, frames=frames)
        drawn.append((anchor, length, frames, result))
    return drawn


def _duplicates(counts: tuple[int, ...], *, roomy: bool) -> float:
    chosen = [ids for _, length, n, ids in _draws(counts) if n > 2 and (length >= 3 * n) == roomy]
    return sum(len(set(ids)) < len(ids) for ids in chosen) / len(chosen)


def _property_checks(record: Mapping[str, Any]) -> Iterator[Check]:
    counts = tuple(sorted(int(n) for n in record["length_by_num_frames"]))
    ours = {
        "always_contains_frame_id": lambda: all(anchor in ids for anchor, _, _, ids in _draws(counts)),
        "sorted": lambda: all(ids == sorted(ids) for *_, ids in _draws(counts)),
        "in_range": lambda: all(0 <= i < length for _, length, _, ids in _draws(counts) for i in ids),
    }
    fractions = {"video at least 3x num_frames": True, "shorter": False}
    known = {*ours, "length_by_num_frames", "fraction_with_duplicates"}
    yield Check("properties names", lambda: same(sorted(record), sorted(known)))
    yield Check(
        "properties.fraction_with_duplicates names",
        lambda: same(sorted(record["fraction_with_duplicates"]), sorted(fractions)),
    )
    for name, holds in ours.items():
        yield Check(f"properties.{name}", lambda n=name, h=holds: same(h(), record[n]))
    for n, lengths in record["length_by_num_frames"].items():
        yield Check(
            f"properties.length_by_num_frames.{n}",
            lambda n=int(n), want=lengths: same(sorted({len(ids) for *_, k, ids in _draws(counts) if k == n}), want),
        )
    for name, roomy in fractions.items():
        yield Check(
            f"properties.fraction_with_duplicates.{name}",
            lambda n=name, r=roomy: near(
                _duplicates(counts, roomy=r), record["fraction_with_duplicates"][n], abs=FRACTION_TOLERANCE
            ),
        )


def _items(annotation: Mapping[str, Any], frames: int) -> list[dict[str, Any]]:
    """One epoch in the order of the file, with sorted frame names."""
    return [
        {
            "video": video,
            "exp": expression["exp"],
            "frame_id": anchor,
            "anno_id": [str(i) for i in expression["anno_id"]],
            "frames": sorted(entry["frames"]),
        }
        for video, entry in annotation["videos"].items()
        for expression in entry["expressions"].values()
        for anchor in anchor_frames(len(entry["frames"]), frames)
    ]


def frames_checks(data: ParitySet) -> Iterator[Check]:
    examples = data.record("frame_sampling/examples.json")
    enumeration = data.record("frame_sampling/enumeration.json")
    assert examples and enumeration["frame_ids"], "nothing is recorded"
    for i, row in enumerate(examples):
        yield Check(
            f"examples[{i}]",
            lambda r=row: same(
                sparse_frames(Random(r["seed"]), anchor=r["frame_id"], length=r["vid_len"], frames=r["num_frames"]),
                r["result"],
            ),
        )
    yield from _property_checks(data.record("frame_sampling/properties.json"))
    for key, want in enumeration["frame_ids"].items():
        length, frames = (int(n) for n in re.fullmatch(r"len(\d+)_n(\d+)", key).groups())
        yield Check(f"enumeration.{key}", lambda n=length, f=frames, w=want: same(list(anchor_frames(n, f)), w))
    listings = [key for key in enumeration if key.startswith("items_num_frames_")]
    assert listings, "no items are recorded"
    for key in listings:
        ours = _items(enumeration["tiny_annotation"], int(key.rsplit("_", 1)[1]))
        yield Check(f"enumeration.{key} count", lambda o=ours, k=key: same(len(o), len(enumeration[k])))
        for i, want in enumerate(enumeration[key]):
            yield Check(f"enumeration.{key}[{i}]", lambda o=ours, i=i, w=want: same(o[i : i + 1], [w]))
