"""The plan of an evaluation: work of the encoders, DiT and decoder, and the memory for the longest video."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flowmask.data_pipeline.clip.pixels import eval_size
from flowmask.data_pipeline.config import FrameBox
from flowmask.data_pipeline.sources import open_source
from flowmask.launch.jobs import EvaluateJob
from flowmask.launch.plan.encoders import BYTES, Encoders, share_of_peak, with_allowances
from flowmask.launch.plan.model import architecture, parameters
from flowmask.launch.plan.one_pass import Shape
from flowmask.launch.plan.train import GpuSpeed
from flowmask.models.config import LightDecoderConfig, Precision
from flowmask.models.decoders.light import SETTING
from flowmask.models.errors import DataError, UserError
from flowmask.models.segment import decoded_together, sampled_together
from flowmask.trainer.predict.inference import EncoderPrecision
from flowmask.trainer.predict.weights import source_settings, stored_settings
from flowmask.trainer.predict.windows.cut import cut

_DTYPE: dict[Precision, str] = {"bf16": "bfloat16", "fp32": "float32"}
_TEXT_TOKENS = 256


@dataclass(frozen=True)
class EvaluatePlan:
    """The plan of an evaluation."""

    counted: bool  # from the dataset; else for one clip and one sentence
    videos: int
    sentences: int
    longest: str
    weights_bytes: float
    device_bytes: float
    flop: float
    workers: int
    hours: float
    speed: GpuSpeed
    decoder_share: float | None  # share of the VAE decoder's FLOPs; None: the VAE's decoder is used
    notes: list[str] = field(default_factory=list)


def plan_evaluation(job: EvaluateJob, *, speed: GpuSpeed, clip: Shape | None = None) -> EvaluatePlan:
    """clip: the shape to plan for if the dataset can't be read."""
    shapes = architecture(_wan(job))
    notes, encoders = list(shapes.notes), Encoders(shapes)
    work, counted = _videos(job, clip, notes)
    if job.calibrate.enabled:
        work += _videos(job.model_copy(update={"data": job.calibrate.data, "max_videos": None}), clip, notes)[0]
        notes.append("the videos of calibrate.data are counted too")
    longest = max((shape for shape, *_ in work), key=lambda s: s.pixels)
    dtype, encoded = _DTYPE[job.precision], _encoder_precision(job)
    dit, light = parameters(shapes.dit(video_injection=True)), _light_decoder(job)
    weights = dit * BYTES[dtype] + encoders.text_bytes(_DTYPE[encoded.text])
    weights += encoders.vae_bytes(_DTYPE[encoded.video]) + encoders.decoder_bytes(_DTYPE[job.decoder_precision], light)
    sentences = sum(count for _, count, _ in work)
    most = max(count for _, count, _ in work)
    sampled = min(most, sampled_together(longest.latent, text_tokens=_TEXT_TOKENS))
    decoded = min(sampled, decoded_together(longest.latent))
    passes = (
        encoders.encode(longest, dtype=_DTYPE[encoded.video]),
        encoders.decode(longest, dtype=_DTYPE[job.decoder_precision], masks=decoded, light=light),
        encoders.dit(longest, sentences=sampled, text_tokens=_TEXT_TOKENS, dtype=getattr(torch, dtype)),
    )
    flop = sum(windows * _flop(job, encoders, encoded, shape, count, light=light) for shape, count, windows in work)
    workers = job.launch.world_size
    return EvaluatePlan(
        counted=counted,
        videos=len(work),
        sentences=sentences,
        longest=str(longest),
        weights_bytes=weights,
        device_bytes=with_allowances(weights + max(one.peak_bytes for one in passes)),
        flop=flop,
        workers=workers,
        hours=flop / (speed.flop_per_s * workers) / 3600,
        speed=speed,
        decoder_share=None if light is None else encoders.share_of_vae(longest, light),
        notes=notes,
    )


def _encoder_precision(job: EvaluateJob) -> EncoderPrecision:
    """Precision of the encoders; weights that do not exist yet are assumed to have a cache with default settings."""
    trained = {"encoder_dtype": "float32"}
    if Path(job.checkpoint).exists():
        with suppress(UserError):
            trained = source_settings(job.checkpoint)
    return EncoderPrecision.of(trained, asked=job.encoder_precision, otherwise=job.precision)


def _light_decoder(job: EvaluateJob) -> LightDecoderConfig | None:
    """The size of the evaluation's light mask decoder; None if it uses another one, or a missing one."""
    with suppress(UserError):
        named = job.mask_decoder or source_settings(job.checkpoint).get("mask_decoder") or "vae"
        found = stored_settings(named).get(SETTING)
        return None if found is None else LightDecoderConfig.model_validate(found)
    return None


def _flop(
    job: EvaluateJob,
    encoders: Encoders,
    encoded: EncoderPrecision,
    shape: Shape,
    sentences: int,
    *,
    light: LightDecoderConfig | None,
) -> float:
    """FLOPs of one window; those in fp32 are scaled to the bf16 FLOPs of equal duration."""
    times = (2 if job.shuffled_text else 1) * sentences

    def slow(precision: Precision, *, products: bool) -> float:
        return 1 / share_of_peak(_DTYPE[precision], tf32=job.tf32, products=products)

    frames = Shape(min(shape.frames, 9), shape.height, shape.width)  # causal: each group of four frames costs the same
    more = shape.frames / frames.frames
    encode, decode = encoders.encode(frames, dtype=_DTYPE[encoded.video]), encoders.decode(frames, light=light)
    convolutions = (
        slow(encoded.video, products=False) * encode.flop
        + slow(job.decoder_precision, products=False) * times * decode.flop
    )
    dtype = getattr(torch, _DTYPE[job.precision])
    dit = encoders.dit(shape, sentences=1, text_tokens=_TEXT_TOKENS, dtype=dtype)
    text = encoders.text_flop(20.0 * times, sentences=times)
    of_dit = slow(job.precision, products=True) * times * job.sampler.steps * dit.flop
    return more * convolutions + of_dit + slow(encoded.text, products=True) * text


def _wan(job: EvaluateJob) -> Path:
    """The Wan folder of the evaluation; if it does not exist, built-in shapes are used."""
    if job.model.wan is not None:
        return job.model.wan
    try:
        return Path(source_settings(job.checkpoint)["wan"])
    except (UserError, KeyError):
        return Path(job.checkpoint)


def _videos(job: EvaluateJob, clip: Shape | None, notes: list[str]) -> tuple[list[tuple[Shape, int, int]], bool]:
    """Each video's clip shape (of a window), number of sentences and number of windows."""
    box = job.box or FrameBox()
    if not job.data.root.exists():
        shape = clip or Shape(17, box.height_px, box.width_px)
        notes.append(
            f"data.root {job.data.root} does not exist: the figures are for one clip of {shape} and one sentence"
        )
        return [(shape, 1, 1)], False
    found = []
    for video in list(open_source(job.data).videos())[: job.max_videos]:
        if not video.expressions:
            continue
        try:
            height, width = video.size
            windows = cut(len(video.frame_names), job.window)
        except DataError:
            continue
        width, height = eval_size(width, height, height=box.height_px, width=box.width_px, multiple=box.size_multiple)
        length = len(windows[0].frames)
        found.append((Shape(length + -(length - 1) % 4, height, width), len(video.expressions), len(windows)))
    if not found:
        raise DataError(f"{job.data.root} ({job.data.split}) holds no expression; there is nothing to evaluate")
    return found, True
