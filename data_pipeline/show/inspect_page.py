"""`flowmask cache inspect`: one HTML page of a finished cache, its numbers and a contact sheet."""

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.cache import quarantine
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.show import page
from flowmask.data_pipeline.show.inspect_cache import CacheFacts, OnProgress, count
from flowmask.data_pipeline.show.inspect_examples import CachedExample, ExampleDecoder
from flowmask.data_pipeline.show.page_file import PageFile
from flowmask.data_pipeline.show.paint import PREDICTED_COLOUR, TRUE_COLOUR, lit
from flowmask.models.errors import CacheError

_TITLE = "Latent cache"
_MAX_BUCKETS, _MAX_COLUMNS, _MAX_SENTENCES, _MAX_QUARANTINED = 24, 12, 4, 20
_PROOF = (
    "Decoded from the stored latents by the VAE that made them. Green: the true mask, as the record has it. "
    "Orange: the mask decoded from its latent."
)


def inspect(
    folder: Path,
    *,
    out: Path,
    examples: int = 12,
    seed: int = 0,
    wan: Path | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> CacheFacts:
    """Write the page of a finished cache to `out`, complete or not at all; returns its numbers.

    examples: the number of examples drawn by `seed` and decoded; 0 needs no VAE
    wan: weights folder with the cache's VAE; by default the one in the build's config
    """
    file = PageFile(out, title=_TITLE, kind="a cache", error=CacheError)
    file.refuse()
    reader = CacheReader(folder)
    try:
        decoder = ExampleDecoder(reader, wan=wan) if examples else None  # refuses before the long reading
        facts = count(reader, on_progress=on_progress)
        body = [_tiles(facts), *_charts(facts)]
        if decoder is not None:
            body += _contact_sheet(decoder, examples, seed=seed, on_progress=on_progress)
    finally:
        reader.close()
    body += [*_set_aside(folder, facts), *_origin(facts)]
    file.write(str(folder), body)
    return facts


def _tiles(facts: CacheFacts) -> str:
    manifest = facts.manifest
    tiles = {
        "examples": f"{manifest.examples:,}",
        "clips, all views" if manifest.views > 1 else "clips": f"{manifest.clips:,}",
        "views": str(manifest.views),
        "masks": f"{facts.masks:,}",
        "sentences, once a clip": f"{facts.sentences:,}",
        "shards": f"{len(manifest.shards):,}",
        f"in shards ({manifest.dtype})": _size(sum(facts.bytes_by_kind.values())),
        "in the index": _size(manifest.index.size),
        "flipped clips": _share(facts.flipped, manifest.clips),
        "cropped clips": _share(facts.cropped, manifest.clips),
        "examples of several objects": _share(int(facts.objects[2:].sum()), manifest.examples),
        "empty masks dropped": f"{manifest.dropped_empty_masks:,}",
    }
    if manifest.no_target:
        tiles["examples that name nothing"] = _share(manifest.no_target, manifest.examples)
    if manifest.partly_annotated:
        tiles["examples with frames not annotated"] = _share(manifest.partly_annotated, manifest.examples)
    if manifest.role == "evaluation":
        tiles["role"] = "evaluation"
    if sources := manifest.fingerprint.fields.get("data.sources"):
        tiles["datasets"] = ", ".join(sources)
    if manifest.quarantined_clips or manifest.unreadable_videos:
        tiles["clips quarantined"] = _share(manifest.quarantined_clips, manifest.clips + manifest.quarantined_clips)
        tiles["videos unreadable"] = f"{manifest.unreadable_videos:,}"
    if manifest.leaks and manifest.leaks.dropped_videos:
        tiles["videos left out as leaks"] = f"{manifest.leaks.dropped_videos:,}"
    if facts.planned is not None:
        tiles["examples dropped"] = _share(facts.planned - manifest.examples, facts.planned)
    return page.tiles(tiles)


def _charts(facts: CacheFacts) -> list[str]:
    total = sum(facts.bytes_by_kind.values())
    kinds = {kind: (size, f"{_size(size)}, {size / total:.1%}") for kind, size in facts.bytes_by_kind.items()}
    histograms = (
        ("Examples by tokens of the sentence", facts.tokens),
        ("Clips by number of examples", facts.examples_per_clip),
        ("Examples by annotations in the mask", facts.objects),
    )
    charts = [(title, page.bars(_histogram(counts))) for title, counts in histograms]
    return [
        page.heading("Bytes by kind"),
        page.bars(kinds),
        page.heading("Buckets: frames x height x width in px"),
        page.bars(_buckets(facts)),
        page.side_by_side([page.heading(title) + chart for title, chart in charts]),
    ]


def _buckets(facts: CacheFacts) -> dict[str, tuple[float, str]]:
    """The largest buckets in the order of their shapes, then all others together."""
    entries = [
        (bucket.name, sum(bucket.examples), int(clips))
        for bucket, clips in zip(facts.manifest.buckets, facts.clips_of_bucket, strict=True)
    ]
    kept = {name for name, *_ in sorted(entries, key=lambda entry: -entry[1])[:_MAX_BUCKETS]}
    others = [entry for entry in entries if entry[0] not in kept]
    shown = [entry for entry in entries if entry[0] in kept]
    if others:
        shown.append((f"{len(others)} others", sum(e[1] for e in others), sum(e[2] for e in others)))
    return {
        name: (examples, f"{_many(examples, 'example')} in {_many(clips, 'clip')}") for name, examples, clips in shown
    }


def _histogram(counts: NDArray[np.int64]) -> dict[str, tuple[float, str]]:
    return {name: (count, f"{count:,}") for name, count in _columns(counts).items()}


def _columns(counts: NDArray[np.int64]) -> dict[str, int]:
    """A histogram from its first to its last value, in at most _MAX_COLUMNS parts of equal width."""
    held = np.flatnonzero(counts)
    first, last = int(held[0]), int(held[-1])
    width = -(-(last - first + 1) // _MAX_COLUMNS)
    columns = {}
    for low in range(first, last + 1, width):
        high = low + width - 1
        columns[str(low) if width == 1 else f"{low}–{high}"] = int(counts[low : high + 1].sum())
    return columns


def _contact_sheet(decoder: ExampleDecoder, examples: int, *, seed: int, on_progress: OnProgress) -> list[str]:
    sheets, overlaps = [], []
    for example in decoder.draw(examples, seed=seed, on_progress=on_progress):
        sheets.append(_sheet(example))
        overlaps.append(example.iou)
    overlap = f"Mask IoU of these {len(sheets)}: mean {np.mean(overlaps):.3f}, lowest {min(overlaps):.3f}."
    head = [page.heading(f"Contact sheet: examples drawn by seed {seed}"), page.paragraph(f"{_PROOF} {overlap}")]
    return [*head, *([page.note(decoder.why_no_originals)] if decoder.why_no_originals else []), *sheets]


def _sheet(example: CachedExample) -> str:
    record, expression = example.record, example.expression
    rows = {"original": list(example.originals)} if example.originals is not None else {}
    rows["decoded frame"] = list(example.frames)
    for label, masks, tone in (
        ("true mask", example.true, TRUE_COLOUR),
        ("decoded mask", example.decoded, PREDICTED_COLOUR),
    ):
        rows[label] = [lit(frame, mask, tone) for frame, mask in zip(example.frames, masks, strict=True)]
    anno_ids = record["masks"][expression["mask"]]["anno_ids"]
    facts = [
        f"example {example.example_id}",
        f"{record['video_id']}/{expression['exp_id']}",
        f"view {record['view']}",
        *(["flipped"] if record["flip"] else []),
        *([f"crop {'x'.join(map(str, record['crop'][2:]))}"] if record["crop"] else []),
        f"{len(record['frame_ids'])}x{record['size'][1]}x{record['size'][0]}",
        _many(len(anno_ids), "object"),
        _many(example.tokens, "token"),
        f"mask IoU {example.iou:.3f}",
        *([f"PSNR {example.psnr_db:.1f} dB"] if example.psnr_db is not None else []),
    ]
    return page.sheet(
        expression["text"],
        detail=" · ".join(facts),
        rows=rows,
        columns=[f"frame {record['frame_ids'][place]}" for place in example.places],
        below=_same_mask(example),
    )


def _same_mask(example: CachedExample) -> str:
    """The clip's other sentences with the same mask."""
    own = example.expression
    others = [
        f"“{expression['text']}”"
        for expression in example.record["expressions"]
        if expression["mask"] == own["mask"] and expression["exp_id"] != own["exp_id"]
    ]
    more = [f"and {len(others) - _MAX_SENTENCES} more"] if len(others) > _MAX_SENTENCES else []
    return "Same mask: " + ", ".join(others[:_MAX_SENTENCES] + more) if others else ""


def _set_aside(folder: Path, facts: CacheFacts) -> list[str]:
    """Unreadable inputs, the first of them, and the protection of evaluation data."""
    body, leaks = [], facts.manifest.leaks
    if lines := quarantine.read(folder / quarantine.FILE):
        shown = {
            f"{line['video']} {line['clip'] or ''}": f"{line['file']}: {line['reason']}"
            for line in lines[:_MAX_QUARANTINED]
        }
        body += [page.heading(f"Quarantine: {_many(len(lines), 'unreadable input')}"), page.pairs(shown)]
        if len(lines) > len(shown):
            body.append(page.paragraph(f"and {len(lines) - len(shown):,} more in {quarantine.FILE}"))
    if leaks is not None and facts.manifest.role == "train":
        checked = {
            "handling": leaks.setting,
            "splits looked into": ", ".join(leaks.checked) or "none was found",
            **({"splits without a list": ", ".join(leaks.unreadable)} if leaks.unreadable else {}),
            "videos left out": f"{leaks.dropped_videos:,}",
        }
        body += [page.heading("Kept apart from evaluation"), page.pairs(checked)]
    return body


def _origin(facts: CacheFacts) -> list[str]:
    """The origin of the bytes: libraries and devices, then the fingerprint."""
    manifest = facts.manifest
    made = Counter(shard.made_with for shard in manifest.shards)
    body = [page.heading("Made with")]
    for number, environment in enumerate(manifest.environments):
        body.append(page.pairs({"shards": f"{made[number]:,}", **environment}))
    prints = manifest.fingerprint
    hashes = {"total": prints.total, "text": prints.text, "video": prints.video, "masks": prints.masks}
    fields = {name: str(value) for name, value in sorted(prints.fields.items())}
    return [*body, page.heading("Fingerprint"), page.pairs(hashes), page.heading("Its fields"), page.pairs(fields)]


def _size(count_bytes: int) -> str:
    """Bytes in the largest unit that gives a number of at least one."""
    value, units = float(count_bytes), ["kB", "MB", "GB", "TB"]
    if value < 1000:
        return f"{count_bytes} B"
    while units:
        value, unit = value / 1000, units.pop(0)
        if value < 999.5 or not units:
            break
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def _many(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if part and whole else f"{part:,}"
