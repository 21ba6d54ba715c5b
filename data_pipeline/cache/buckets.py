"""Buckets: the examples of one clip shape, for manifests and epoch plans."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """The examples of one clip shape: `counts[v]` in view v, numbered from `first[v]` without gaps."""

    name: str
    first: tuple[int, ...]
    counts: tuple[int, ...]
