"""`flowmask cache build`: its phases, run by any number of workers that need not know of each other.

Plan (once), sentences, clips, finalise. What is finished is found on the disk, so the same command
continues a build that was killed, and ends with the same bytes as one that was not, whatever the number of
workers.
"""

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from data_pipeline import finalise, manifest, records, sentences, units
from data_pipeline.claims import claim, share_out
from data_pipeline.config import CacheBuildConfig
from data_pipeline.encode import ClipEncoder, EncodedClip
from data_pipeline.fingerprint import fingerprint, refuse_other
from data_pipeline.shards import FOLDER, remove_leftovers, shard_name, sidecar_name
from data_pipeline.sources import open_source
from data_pipeline.sources.base import Source
from models.errors import CacheError, ConfigError
from models.text import TextEncoder
from models.wan import WanFolder

Phase = Literal["plan", "text", "clips", "finalise", "complete"]
_LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "pillow", "numpy", "safetensors")


@dataclass(frozen=True)
class BuildProgress:
    """How far all workers together have come in a phase: units of `text` are sentences, of `clips` clips."""

    phase: Phase
    done: int
    total: int


OnProgress = Callable[[BuildProgress], None]


def build(
    config: CacheBuildConfig, *, worker: int = 0, workers: int = 1, on_progress: OnProgress | None = None
) -> None:
    """Work on the cache `config.out` until it is complete; any number of processes may do so at once.

    `worker` of `workers` only spreads where each begins. A complete cache of the same fingerprint is left
    as it is (the last progress says "complete"); another fingerprint is refused with a CacheError that
    names the fields.
    """
    Build(config, worker=worker, workers=workers, on_progress=on_progress or (lambda _: None)).run()


class Build:
    """One worker's part of a build."""

    def __init__(
        self,
        config: CacheBuildConfig,
        *,
        worker: int = 0,
        workers: int = 1,
        on_progress: OnProgress = lambda _: None,
    ):
        self.config, self.worker, self.workers, self.on_progress = config, worker, workers, on_progress
        self.out = Path(config.out)
        self.work, self.shards = self.out / "work", self.out / FOLDER
        self.device = _device(config.cache.device)
        self.dtype: torch.dtype = getattr(torch, config.cache.dtype)
        self.encoder_dtype: torch.dtype = getattr(torch, config.cache.encoder_dtype)
        self.wan = WanFolder(config.model.wan)
        if self.device.type == "cpu":
            # More threads split sums differently: bytes must not depend on how many workers share the cores.
            torch.set_num_threads(1)

    def run(self) -> None:
        finished = self.out / manifest.FILE
        try:
            self.on_progress(BuildProgress("plan", 0, 1))
            self.source.videos()  # bad input is refused before anything is written
            with claim(self.work / "plan", wait=True):
                plan = self._plan()
            if not finished.exists():
                self._encode_sentences(plan)
                self._encode_clips(plan)
                self.on_progress(BuildProgress("finalise", 0, 1))
                with claim(self.work / "finalise", wait=True):
                    if not finished.exists():
                        finalise.finalise(self.out, plan)
        finally:
            if finished.exists():  # also when refused: a finished cache is left exactly as it was
                shutil.rmtree(self.work, ignore_errors=True)
        self.on_progress(BuildProgress("complete", plan.clips, plan.clips))

    @cached_property
    def source(self) -> Source:
        return open_source(self.config.data)

    def _plan(self) -> units.Plan:
        """The plan on disk, written if there is none; refuses one, or a cache, of another fingerprint."""
        try:
            self.shards.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"cannot write {self.shards}: {error.strerror}; choose another `out`") from error
        ours = fingerprint(self.config, self.source, memo=self.work / "weights.json")
        plan = units.read_plan(self.out / units.FOLDER)
        if plan is None:
            if (self.out / manifest.FILE).exists():
                raise CacheError(
                    f"{self.out} holds a cache without its plan; choose another `out`, or delete it"
                )
            vae: Any = self.wan.vae()
            stats = vae.config
            facts = {
                "latent_channels": stats.z_dim,
                "latents_mean": list(stats.latents_mean),
                "latents_std": list(stats.latents_std),
            }
            units.write_plan(
                self.out / units.FOLDER, self.source, config=self.config, fingerprint=ours, facts=facts
            )
            plan = units.read_plan(self.out / units.FOLDER)
            assert plan is not None
        refuse_other(ours, plan.fingerprint, where=self.out)
        return plan

    def _in_turn(self, units_: int) -> Sequence[int]:
        """All units, beginning at this worker's share, so that workers seldom ask for the same one."""
        first = units_ * self.worker // self.workers
        return [*range(first, units_), *range(first)]

    def _encode_sentences(self, plan: units.Plan) -> None:
        texts = self.work / "texts"
        texts.mkdir(parents=True, exist_ok=True)

        @cache  # a worker that finds all sentences done loads no encoder; freed before the VAE is loaded
        def encoder() -> TextEncoder:
            loaded = self.wan.text_encoder(self.encoder_dtype)
            loaded.model.to(self.device)
            return loaded

        def work(unit: int) -> None:
            sentences.write_unit(texts, unit, plan.unit_texts(unit), encoder=encoder(), dtype=self.dtype)
            done = sum(1 for _ in texts.glob("text-*")) * units.SENTENCES_PER_UNIT
            self.on_progress(BuildProgress("text", min(done, plan.texts), plan.texts))

        self.on_progress(BuildProgress("text", 0, plan.texts))
        share_out(
            self._in_turn(plan.text_units),
            folder=self.work / "claims",
            kind="text",
            done=lambda unit: sentences.unit_path(texts, unit).exists(),
            work=work,
        )

    def _encode_clips(self, plan: units.Plan) -> None:
        def work(unit: int) -> None:
            for name in (shard_name(unit), sidecar_name(unit)):
                remove_leftovers(self.shards, name)
            self._write_unit(plan, unit)

        self._report_clips(plan, own=0)
        share_out(
            self._in_turn(plan.clip_units),
            folder=self.work / "claims",
            kind="clips",
            done=lambda unit: records.read_sidecar(self.shards, unit) is not None,
            work=work,
        )

    def _report_clips(self, plan: units.Plan, *, own: int) -> None:
        finished = sum(1 for _ in self.shards.glob("*.json")) * self.config.cache.clips_per_shard
        self.on_progress(BuildProgress("clips", min(finished + own, plan.clips), plan.clips))

    @cached_property
    def _encoder(self) -> ClipEncoder:
        vae: Any = self.wan.vae(self.encoder_dtype)
        return ClipEncoder(
            vae.to(self.device),
            dtype=self.dtype,
            pixel_norm=self.config.cache.pixel_norm,
            batch_clips=self.config.cache.batch_clips,
            drop_empty_masks=self.config.cache.drop_empty_masks,
        )

    def encode_unit(self, plan: units.Plan, unit: int) -> list[EncodedClip]:
        """The clips of a unit, encoded on the fly: exactly what its shard stores."""
        videos = self.source.videos()
        count = 0

        def on_clip() -> None:
            nonlocal count
            count += 1
            self._report_clips(plan, own=count)

        clips = ((clip, videos[clip.video]) for clip, _ in plan.unit_clips(unit))
        return self._encoder.encode(clips, on_clip=on_clip)

    def _write_unit(self, plan: units.Plan, unit: int) -> None:
        numbers = {clip.key: texts for clip, texts in plan.unit_clips(unit)}
        encoded = self.encode_unit(plan, unit)
        kept = [(clip, numbers[clip.clip.key]) for clip in encoded]
        wanted = {number for _, texts in kept for number in texts}
        planned = sum(len(clip.masks) for clip, _ in plan.unit_clips(unit))
        records.write_unit(
            self.shards,
            unit,
            kept,
            embeddings=sentences.Embeddings(self.work / "texts").of(sorted(wanted)),
            dropped=planned - sum(len(clip.mask_means) for clip in encoded),
            made_with=_environment(self.device),
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("cache.device is cuda, but this machine has no usable GPU; use auto or cpu")
    return torch.device(name)


def _environment(device: torch.device) -> dict[str, str]:
    """What the bytes depend on beside the fingerprint: library versions and the kind of device."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    return {"device": kind, **{name: importlib.metadata.version(name) for name in _LIBRARIES}}
