"""Hashes of everything that determines the bytes of a cache, field by field, for text, video and masks.

It contains no paths, worker counts or devices. A cache is used, continued or repaired only with the same fingerprint;
otherwise the error names the fields that differ.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.cache.manifest import LONG_TEXT, SHORT_TEXT, Fingerprint
from flowmask.data_pipeline.cache.shards import write_file
from flowmask.data_pipeline.config import CacheBuildConfig, source_names
from flowmask.data_pipeline.sources.base import VideoSet, names_nothing
from flowmask.models.errors import CacheError
from flowmask.models.stored.sealed import parse_json, to_json
from flowmask.models.weights.wan import WanFolder

_SENTENCES = ("data.expressions", "text.", "cache.lowercase", "cache.batch_sentences")
_TEXT = ("format", "model.text_encoder", "model.tokenizer", *_SENTENCES)
_DATA = ("data.frames", "data.sources", "data.allow_truncated")
_MASK_FILES = "data.mask_files"  # earlier versions did not hash them
_PIXELS = ("format", "model.vae", *_DATA, "clip.", "cache.seed", "cache.views", "cache.batch_clips")
_EXAMPLES = ("cache.clips_per_shard", "cache.drop_empty_masks", "cache.no_target")
_VIDEO = (*_PIXELS, *_EXAMPLES, "cache.pixel_norm")
_MASKS = (*_PIXELS, *_EXAMPLES, "data.expressions", "data.masks", _MASK_FILES)
_STORAGE = ("cache.dtype", "cache.encoder_dtype", "cache.tf32")
_MEMO_ENTRIES = 64
_log = logging.getLogger("flowmask")
_UNSHAPED = ("device", "held_out", "lease_s", "decode_threads", "max_quarantined_fraction")


def fingerprint(config: CacheBuildConfig, source: VideoSet, *, memo: Path) -> Fingerprint:
    """The fingerprint of a build; `memo` keeps the hashes of weights, which are slow, for all workers."""
    wan = WanFolder(config.model.wan)
    fields: dict[str, Any] = {"format": 1, "text.limits": [SHORT_TEXT, LONG_TEXT]}
    for part in ("vae", "text_encoder", "tokenizer"):
        fields[f"model.{part}"] = _weights_identity(wan, part, memo=memo)
    fields |= _data_fields(config, source)
    cache = config.cache.model_dump(mode="json", exclude={*_UNSHAPED, "no_target"})  # no_target comes from the data
    fields |= {f"cache.{name}": value for name, value in cache.items()}
    if fields["cache.tf32"] is None:  # the behaviour before this key existed
        fields.pop("cache.tf32")
    if fields["cache.batch_sentences"] == 1:  # likewise
        fields.pop("cache.batch_sentences")
    if fields.get("cache.leaks") != "drop":  # other values do not change bytes
        fields.pop("cache.leaks", None)
    return Fingerprint(
        total=_hash_fields(fields, ("",)),
        text=_hash_fields(fields, (*_TEXT, *_STORAGE)),
        video=_hash_fields(fields, (*_VIDEO, *_STORAGE)),
        masks=_hash_fields(fields, (*_MASKS, *_STORAGE)),
        fields=fields,
    )


def _data_fields(config: CacheBuildConfig, source: VideoSet) -> dict[str, Any]:
    """Fields of the datasets and of their clips; the name of a dataset is part of its fields."""
    names = source_names(config.sources)
    fields: dict[str, Any] = {f"data.{name}": value for name, value in source.identity().items()}
    without_target = False
    for name, videos in groupby(source.videos(), key=lambda video: video.source):
        digests = []
        for video in videos:
            if video.expressions:
                digests.append(video.files_digest())
                without_target = without_target or any(names_nothing(video, e) for e in video.expressions)
        fields[f"data.frames.{name}" if name else "data.frames"] = _hash(digests)
    if without_target:  # otherwise it changes no byte, and older fingerprints lack it
        fields["cache.no_target"] = config.cache.no_target
    if any(names):
        fields["data.sources"] = names  # their order gives the clips their numbers
    if shortened := [name for name, data in zip(names, config.sources, strict=True) if data.allow_truncated]:
        fields["data.allow_truncated"] = shortened
    base = config.clip if len(names) > 1 else config.clip_of(names[0])
    fields |= {f"clip.{name}": value for name, value in base.model_dump(mode="json").items()}
    own = {name: config.clip_of(name).frames for name in names}
    return fields | {f"clip.frames.{name}": frames for name, frames in own.items() if frames != base.frames}


def refuse_other(
    ours: Fingerprint, theirs: Fingerprint, *, where: Path, advice: str = "choose another `out`, or delete it"
) -> None:
    """CacheError with every field in which a cache differs from the requested one.

    A field that the cache's version did not have is no difference; one warning says which changes stay unnoticed.
    """
    if ours.total == theirs.total:
        return
    names = sorted(ours.fields.keys() | theirs.fields.keys())
    differing = [name for name in names if ours.fields.get(name) != theirs.fields.get(name)]
    if differing and all(name.startswith(_MASK_FILES) and name not in theirs.fields for name in differing):
        _log.warning("%s was made by a version without hashes of mask files: changed masks are not detected", where)
        return
    details = "; ".join(
        f"{name}: {_short(theirs.fields.get(name))} there, {_short(ours.fields.get(name))} asked for"
        for name in differing
    )
    raise CacheError(f"{where} holds a cache of another fingerprint ({details}): {advice}")


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()


def _hash_fields(fields: dict[str, Any], prefixes: tuple[str, ...]) -> str:
    chosen = {name: value for name, value in fields.items() if name.startswith(prefixes)}
    return hashlib.sha256(to_json(chosen)).hexdigest()


def _weights_identity(wan: WanFolder, part: str, *, memo: Path) -> str:
    """Hash of a part's weights; from a memo if names, sizes and times of its files are unchanged.

    The build's memo saves other workers the reading; the user's memo saves it for all later commands.
    """
    files = sorted((wan.path / part).glob("*"))
    state = [f"{file.resolve()} {(stat := file.stat()).st_size} {stat.st_mtime_ns}" for file in files]
    key = _hash([part, *state])
    memos = {path: _read_memo(path) for path in (memo, _users_memo())}
    found = next((known[key] for known in memos.values() if key in known), None) or wan.identity(part)
    for path, known in memos.items():
        if key in known:
            continue
        with suppress(CacheError, OSError):  # a read-only home; a build that has just ended
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, to_json(dict([*known.items(), (key, found)][-_MEMO_ENTRIES:])))
    return found


def _users_memo() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - never raises
    return Path(base) / "flowmask" / "weights.json"


def _read_memo(path: Path) -> dict[str, str]:
    """The content of a memo; empty if it is missing or damaged: then weights are read again."""
    try:
        known = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
