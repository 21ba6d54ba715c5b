"""`flowmask cache verify s3://...`: hashes the files of a cache in an object store that training reads.

The manifest has a seal, and the hash of the index and of every shard. Check plan, sidecars and decoded masks in the
folder that was uploaded.
"""

from collections.abc import Iterator
from pathlib import Path

from flowmask.data_pipeline.cache import manifest
from flowmask.data_pipeline.cache.manifest import FileEntry, parse_manifest
from flowmask.data_pipeline.cache.objects import ObjectStore, hash_of
from flowmask.data_pipeline.cache.shards import FOLDER
from flowmask.data_pipeline.check.verify_report import Problem, VerifyReport
from flowmask.data_pipeline.config import refuse_other_url
from flowmask.data_pipeline.show.inspect_cache import OnProgress
from flowmask.models.errors import ConfigError

_RETRIES = 3
_NOT_DECODED = "a cache in an object store is hashed; verify the folder that was uploaded to decode masks"


def verify_stored(url: str, *, on_progress: OnProgress = lambda *_: None) -> VerifyReport:
    """Every object that is missing or has another size or hash; CacheError if there is no cache."""
    try:
        refuse_other_url(url, key="the cache")
    except ValueError as error:
        raise ConfigError(error) from None
    store = ObjectStore(url, retries=_RETRIES)
    content = store.whole(manifest.FILE, limit=manifest.MOST_BYTES)
    found = parse_manifest(content, where=f"{store.url}/{manifest.FILE}")
    files: list[tuple[str, FileEntry]] = [(found.index.file, found.index)]
    files += [(f"{FOLDER}/{shard.file}", shard) for shard in found.shards]
    report = VerifyReport(
        shards=len(found.shards),
        records=sum(shard.records for shard in found.shards),
        examples=found.examples,
        not_decoded=_NOT_DECODED,
        environments=found.environments,
    )
    sizes = store.sizes()
    for number, (name, entry) in enumerate(files):
        on_progress("files", number, len(files))
        report.problems += [Problem(Path(name), reason) for reason in _wrong(store, name, entry, sizes.get(name))]
    on_progress("files", len(files), len(files))
    return report


def _wrong(store: ObjectStore, name: str, entry: FileEntry, size: int | None) -> Iterator[str]:
    """The fault of an object; empty if there is none."""
    if size is None:
        yield "missing"
    elif size != entry.size:
        yield f"{size} bytes, it was written with {entry.size}"
    elif hash_of(store.pieces(name, size)) != entry.sha256:
        yield "its SHA-256 is not the one it was written with: a byte has changed"
