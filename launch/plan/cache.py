"""The plan of a cache: passes, bytes and encoder hours, counted from the dataset or from the plan of a begun build."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flowmask.data_pipeline.cache.index import ROW
from flowmask.data_pipeline.cache.manifest import LONG_TEXT, SHORT_TEXT
from flowmask.data_pipeline.clip.clips import Clip, clips_of
from flowmask.data_pipeline.config import source_names
from flowmask.data_pipeline.plan.cost import ViewCost
from flowmask.data_pipeline.plan.leaks import without_leaks
from flowmask.data_pipeline.plan.units import FOLDER, read_plan
from flowmask.data_pipeline.sources import open_source
from flowmask.launch.jobs import CacheJob
from flowmask.launch.plan.encoders import BYTES, Encoders, share_of_peak, with_allowances
from flowmask.launch.plan.model import architecture
from flowmask.launch.plan.one_pass import Shape
from flowmask.launch.plan.train import GpuSpeed
from flowmask.models.errors import DataError

_WORD_TOKENS = 1.4  # UMT5 tokens per English word, if there is no tokenizer
# Bytes around the latents, measured on built caches; tests/launch/plan/test_plan.py measures them again
_TAR_MEMBER = 512 + 256  # header, and half a block of padding
_TENSOR_HEADER = 76  # of safetensors, for each tensor
_RECORD_JSON, _MASK_JSON, _FRAME_JSON, _SENTENCE_JSON = 165, 25, 31, 70
_CONTOUR = 1.0  # characters of a mask's run lengths per column of the picture
_PLANNED_CLIP, _PLANNED_SENTENCE = 210, 70  # bytes of their lines in plan/
_ROW_JSON = 70  # bytes in a sidecar per example
# bytes per shard: end of a tar, half a block of padding, fixed part of a sidecar, entry of the manifest
_SHARD = 1024 + 5120 + 550
_CACHE = 6500  # manifest and plan.json


@dataclass
class Counts:
    """The work of one view of a dataset, `by_shape` of clips; tokens: of all stored sentences."""

    cost: ViewCost = field(default_factory=ViewCost)
    by_shape: Counter[Shape] = field(default_factory=Counter)
    examples: int = 0
    mask_frames: int = 0
    contour: float = 0.0  # characters of the masks' outlines
    tokens: float = 0.0
    distinct: dict[str, int] = field(default_factory=dict)  # sentence -> tokens

    def add(self, clip: Clip, count: Callable[[str], int]) -> None:
        for sentence in clip.sentences:
            self.distinct.setdefault(sentence.text, min(LONG_TEXT, count(sentence.text)))
        texts = {sentence.text for sentence in clip.sentences}
        self.cost.add(clip, list(range(len(texts))))
        width, height = clip.geometry.size
        self.by_shape[Shape(len(clip.frame_ids), height, width)] += 1
        self.examples += len(clip.sentences)
        frames = len(clip.masks) * len(clip.frame_ids)
        self.mask_frames += frames
        self.contour += frames * width * _CONTOUR
        for text in texts:
            tokens = self.distinct[text]
            self.tokens += tokens + (SHORT_TEXT if tokens > SHORT_TEXT else 0)


@dataclass(frozen=True)
class CachePlan:
    """The plan of a cache for all views together; an upper bound if masks may be empty."""

    counted: bool  # from the dataset; else estimated from one clip
    clips: int
    masks: int
    examples: int
    sentences: int
    shapes: dict[str, float]
    latent_bytes: float
    text_bytes: float
    total_bytes: float
    video_flop: float
    text_flop: float
    workers: int
    hours: float
    device_bytes: float
    host_bytes: float
    speed: GpuSpeed
    notes: list[str] = field(default_factory=list)


def plan_cache(job: CacheJob, *, speed: GpuSpeed) -> CachePlan:
    """Count view 0 of the dataset; without a readable dataset, one clip of the config's shape."""
    shapes = architecture(job.model.wan)
    notes, encoders = list(shapes.notes), Encoders(shapes)
    counts, counted = _count(job, notes)
    views = job.cache.views if counted else 1
    shards = -(-counts.cost.clips // job.cache.clips_per_shard)
    value = BYTES[job.cache.dtype]
    largest = {shape.frames: shape for shape in sorted(counts.by_shape, key=lambda s: s.pixels)}
    passes = 1 + _masks(counts) / max(counts.cost.clips, 1)
    one_pass = sum(n * encoders.pixel_flop(largest[s.frames]) * s.pixels for s, n in counts.by_shape.items())
    video_flop = views * passes * one_pass
    tokens = float(sum(counts.distinct.values()))
    text_flop = encoders.text_flop(tokens, sentences=len(counts.distinct))
    text_dim = shapes.dit_config["text_dim"]
    latent_bytes = views * counts.cost.latent_values * value
    text_bytes = views * counts.tokens * text_dim * value
    workers = job.launch.array * job.launch.nodes * job.launch.processes_per_node
    shares = [share_of_peak(job.cache.encoder_dtype, tf32=job.cache.tf32, products=text) for text in (False, True)]
    busy_s = sum(flop / share for flop, share in zip((video_flop, text_flop), shares)) / speed.flop_per_s
    most = max(counts.by_shape, key=lambda s: s.pixels)
    batch = encoders.encode(most, dtype=job.cache.encoder_dtype, clips=job.cache.batch_clips)
    vae, text = (f(job.cache.encoder_dtype) for f in (encoders.vae_bytes, encoders.text_bytes))
    text_peak = text
    if job.cache.batch_sentences > 1:
        tokens, most_alike = max(counts.distinct.values()), job.cache.batch_sentences
        text_peak += encoders.embed(sentences=most_alike, tokens=tokens, dtype=job.cache.encoder_dtype).peak_bytes
    if job.cache.encoder_dtype == "float32":
        rates = [f"1/{1 / share:.0f}" for share in shares]
        notes.append(
            f"encoders in float32: video at {rates[0]} of the GPU's bf16 peak, text at {rates[1]} (cache.tf32)"
        )
    return CachePlan(
        counted=counted,
        clips=views * counts.cost.clips,
        masks=views * _masks(counts),
        examples=views * counts.examples,
        sentences=len(counts.distinct),
        shapes={str(s): n / counts.cost.clips for s, n in counts.by_shape.most_common()},
        latent_bytes=latent_bytes,
        text_bytes=text_bytes,
        total_bytes=latent_bytes + text_bytes + _CACHE + views * _around(counts, shards=shards),
        video_flop=video_flop,
        text_flop=text_flop,
        workers=workers,
        hours=busy_s / workers / 3600,
        device_bytes=with_allowances(max(text_peak, vae + batch.peak_bytes)),
        host_bytes=text + 1.5e9,
        speed=speed,
        notes=notes,
    )


def _masks(counts: Counts) -> int:
    return counts.cost.passes - counts.cost.clips


def _around(counts: Counts, *, shards: int) -> float:
    """Bytes of a view in addition to latents and embeddings: tar, safetensors, JSON, sidecars, index and plan."""
    clips, masks = counts.cost.clips, _masks(counts)
    tensors = 2 * clips + masks + counts.cost.sentences
    return (
        shards * _SHARD
        + clips * (2 * _TAR_MEMBER + _RECORD_JSON + _PLANNED_CLIP)
        + tensors * _TENSOR_HEADER
        + masks * _MASK_JSON
        + counts.mask_frames * _FRAME_JSON
        + counts.contour
        + counts.examples * (_SENTENCE_JSON + _PLANNED_SENTENCE + _ROW_JSON + ROW.itemsize)
    )


def _count(job: CacheJob, notes: list[str]) -> tuple[Counts, bool]:
    missing = [source.root for source in job.sources if not source.root.exists()]
    if missing:
        notes.append(
            f"data.root {missing[0]} does not exist: the figures are for one clip with one sentence of 15 tokens"
        )
        return _one_clip(job), False
    count, counts, unreadable = _tokens(job.model.wan, notes), Counts(), 0
    for index, video in enumerate(without_leaks(open_source(job.data), job).videos()):
        try:
            for clip in clips_of(
                video, index=index, first_number=0, view=0, clip=job.clip_of(video.source), cache=job.cache
            ):
                counts.add(clip, count)
        except DataError:
            unreadable += 1
    if not counts.cost.clips:
        raise DataError(f"{job.sources[0].root}: no clip with a sentence and a mask can be read; check data.split")
    if unreadable:
        notes.append(f"{unreadable} videos can't be read and are not counted")
    if job.cache.views > 1:
        notes.append(f"{job.cache.views} views, each assumed to cost as much as the first")
    plan = read_plan(Path(job.out) / FOLDER)
    if plan is not None and plan.costs[0].clips != counts.cost.clips:
        notes.append(f"the build in {job.out} was planned with {plan.costs[0].clips} clips a view")
    return counts, True


def _one_clip(job: CacheJob) -> Counts:
    config = job.clip_of(source_names(job.sources)[0])
    multiple = config.size_multiple
    height, width = (side // multiple * multiple for side in (config.short_side, config.long_side))
    shape = Shape(config.frames, height, width)
    f, h, w = shape.latent
    cost = ViewCost(1, 2, 2 * config.frames * height * width, 3 * 16 * f * h * w, 1)
    return Counts(cost, Counter({shape: 1}), 1, config.frames, config.frames * width * _CONTOUR, 15.0, {"sentence": 15})


def _tokens(wan: Path, notes: list[str]) -> Callable[[str], int]:
    """A function that counts the tokens of a sentence with the folder's tokenizer."""
    path = wan / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        notes.append(f"{path} does not exist: {_WORD_TOKENS} tokens per word")
        return lambda text: round(_WORD_TOKENS * len(text.split())) + 1
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text).ids)
