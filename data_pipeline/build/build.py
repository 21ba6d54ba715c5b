"""`flowmask cache build`: its phases, run by any number of workers that need not know of each other.

Plan (once), sentences, clips, finalise. What is finished is found on the disk, so the same command
continues a build that was killed, and ends with the same bytes as one that was not, whatever the number of
workers.
"""

import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from flowmask.data_pipeline.build import finalise, records, sentences
from flowmask.data_pipeline.build.clip_pass import ClipPass
from flowmask.data_pipeline.build.encode import LESS_MEMORY, ClipEncoder
from flowmask.data_pipeline.build.stage_clock import StageClock
from flowmask.data_pipeline.build.warm_up import measure
from flowmask.data_pipeline.cache import manifest
from flowmask.data_pipeline.cache.manifest import Fingerprint
from flowmask.data_pipeline.cache.quarantine import Quarantine
from flowmask.data_pipeline.cache.shards import FOLDER
from flowmask.data_pipeline.claim.claims import claimed, once, share_out
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.plan import units
from flowmask.data_pipeline.plan.cost import describe
from flowmask.data_pipeline.plan.fingerprint import fingerprint, refuse_other
from flowmask.data_pipeline.plan.leaks import LeakFree, without_leaks
from flowmask.data_pipeline.plan.plan_file import text_unit_path
from flowmask.data_pipeline.sources import open_source
from flowmask.models.device import gpu_holds, rank_device, use_tf32
from flowmask.models.errors import CacheError
from flowmask.models.folders.output_folder import OutputFolder
from flowmask.models.text import TextEncoder
from flowmask.models.weights.wan import WanFolder

Phase = Literal["plan", "cost", "text", "clips", "finalise", "complete"]
_COUNT_EVERY_S = 1.0
_LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "pillow", "numpy", "safetensors")


@dataclass(frozen=True)
class BuildProgress:
    """How far all workers together have come in a phase: units of `text` are sentences, of `clips` clips."""

    phase: Phase
    done: int
    total: int
    note: str = ""  # a line for the person who waits


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
        self, config: CacheBuildConfig, *, worker: int = 0, workers: int = 1, on_progress: OnProgress = lambda _: None
    ):
        self.config, self.worker, self.workers, self.on_progress = config, worker, workers, on_progress
        self.out = Path(config.out)
        self.work, self.shards = self.out / "work", self.out / FOLDER
        self.claims, self.finished = self.work / "claims", self.out / manifest.FILE
        self.device = rank_device(config.cache.device, key="cache.device")
        self.dtype: torch.dtype = getattr(torch, config.cache.dtype)
        self.encoder_dtype: torch.dtype = getattr(torch, config.cache.encoder_dtype)
        use_tf32(config.cache.tf32)
        self.wan, self.clock = WanFolder(config.model.wan), StageClock()
        self._empty: dict[tuple[int, ...], torch.Tensor] = {}  # latents of empty masks: kept when the VAE is freed
        self._counted_at, self._finished_clips = 0.0, 0
        if self.device.type == "cpu":
            # More threads split sums differently: bytes must not depend on how many workers share the cores.
            torch.set_num_threads(1)

    def run(self) -> None:
        try:
            self.on_progress(BuildProgress("plan", 0, 1))
            self.source.videos()  # bad input is refused before anything is written
            plan = self._plan()
            if not self.finished.exists():
                self._encode(plan)
        finally:
            if self.finished.exists():  # also when refused: a finished cache is left exactly as it was
                finalise.clear_work(self.work)
        self.on_progress(BuildProgress("complete", plan.clips, plan.clips))

    def _encode(self, plan: units.BuildPlan) -> None:
        try:
            self._tell_cost(plan)
            self._encode_sentences(plan)
            self._encode_clips(plan)
            self.on_progress(BuildProgress("finalise", 0, 1))
            self._quarantine(plan).check()
            once(
                self.claims / "finalise",
                done=self.finished.exists,
                results=self.out,
                work=lambda: finalise.finalise(self.out, plan),
                lease_s=self.config.cache.lease_s,
            )
        except (CacheError, FileNotFoundError):
            if not self.finished.exists():
                raise  # else the others have finished, and cleared away `work` under a slow worker's feet

    @cached_property
    def source(self) -> LeakFree:
        return without_leaks(open_source(self.config.data), self.config)

    def _plan(self) -> units.BuildPlan:
        """The plan on disk, written if there is none; refuses one, or a cache, of another fingerprint."""
        folder = self.out / units.FOLDER
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if units.read_plan(folder) is None:
                OutputFolder(self.out, units.CACHE)
            self.shards.mkdir(exist_ok=True)
        except OSError as error:
            raise CacheError(f"cannot write {self.shards}: {error.strerror}; choose another `out`") from error
        once(
            self.claims / "plan",
            done=lambda: units.read_plan(folder) is not None,
            work=lambda: self._write_plan(folder),
            lease_s=self.config.cache.lease_s,
            results=folder,
        )
        plan = units.read_plan(folder)
        assert plan is not None
        refuse_other(self._fingerprint(), plan.fingerprint, where=self.out)
        return plan

    def _fingerprint(self) -> Fingerprint:
        return fingerprint(self.config, self.source, memo=self.work / "weights.json")

    def _write_plan(self, folder: Path) -> None:
        if self.finished.exists():
            raise CacheError(f"{self.out} holds a cache without its plan; choose another `out`, or delete it")
        self.plan_into(folder, fingerprint=self._fingerprint())

    def plan_into(self, folder: Path, *, fingerprint: Fingerprint) -> None:
        """Write the plan of this build into any folder; DataError, before that, for objects that no mask holds."""
        for video in self.source.videos():
            video.check_masks()
        vae: Any = self.wan.vae()
        stats = vae.config
        facts = {
            "latent_channels": stats.z_dim,
            "latents_mean": list(stats.latents_mean),
            "latents_std": list(stats.latents_std),
            **self.source.facts,
        }
        units.write_plan(folder, self.source, config=self.config, fingerprint=fingerprint, facts=facts)

    def _in_turn(self, units_: int) -> Sequence[int]:
        """All units, beginning at this worker's share, so that workers seldom ask for the same one."""
        first = units_ * self.worker // self.workers
        return [*range(first, units_), *range(first)]

    def _encode_sentences(self, plan: units.BuildPlan) -> None:
        texts = self.work / "texts"
        texts.mkdir(parents=True, exist_ok=True)

        def work(unit: int) -> None:
            with self.clock.measure("text"):
                self.write_text_unit(plan, unit, folder=texts)
            done = sum(1 for _ in texts.glob("text-*")) * units.SENTENCES_PER_UNIT
            self.on_progress(BuildProgress("text", min(done, plan.texts), plan.texts))

        self.on_progress(BuildProgress("text", 0, plan.texts))
        share_out(
            self._in_turn(plan.text_units),
            folder=self.claims,
            kind="text",
            done=lambda unit: text_unit_path(texts, unit).exists() or self.finished.exists(),
            work=work,
            lease_s=self.config.cache.lease_s,
            results=texts,
        )
        self.free("text_encoder")

    def write_text_unit(self, plan: units.BuildPlan, unit: int, *, folder: Path) -> None:
        """Encode the sentences of a unit; the text encoder stays loaded."""
        together = self.config.cache.batch_sentences
        texts, encoder = plan.unit_texts(unit), self.text_encoder
        sentences.write_unit(folder, unit, texts, encoder=encoder, dtype=self.dtype, together=together)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Loaded by a worker that has sentences to encode, freed before the VAE is loaded."""
        loaded = self.wan.text_encoder(self.encoder_dtype)
        with gpu_holds("the text encoder", fix=sentences.LESS_MEMORY):
            loaded.model.to(self.device)
        return loaded

    def free(self, name: str) -> None:
        """Give back the memory of an encoder: the two never share a device."""
        self.__dict__.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _tell_cost(self, plan: units.BuildPlan) -> None:
        """What the build will cost, by encoding one clip and one sentence; said once, before anything is stored."""
        texts = self.work / "texts"
        if self.worker or any(texts.glob("text-*")) or any(self.shards.glob("*.json")):
            return
        speed = measure(
            plan,
            clips=self.clip_pass(plan),
            free_vae=lambda: self.free("encoder"),
            text_encoder=lambda: self.text_encoder,
            dtype=self.dtype,
            together=self.config.cache.batch_sentences,
        )
        if speed is not None:
            note = describe(plan.costs, speed, texts=plan.texts, value_bytes=self.dtype.itemsize, workers=self.workers)
            self.on_progress(BuildProgress("cost", 1, 1, note=note))

    def _encode_clips(self, plan: units.BuildPlan) -> None:
        self._report_clips(plan, own=0)
        self.clip_pass(plan).run(
            lambda: claimed(
                self._in_turn(plan.clip_units),
                folder=self.claims,
                kind="clips",
                done=lambda unit: records.read_sidecar(self.shards, unit) is not None,
                lease_s=self.config.cache.lease_s,
                results=self.shards,
            )
        )

    def _report_clips(self, plan: units.BuildPlan, *, own: int) -> None:
        """own: clips of the unit in hand. Counting the others lists a folder, so it is done once in a while."""
        now = time.monotonic()
        if own <= 1 or now > self._counted_at + _COUNT_EVERY_S:
            self._counted_at = now
            finished = sum(1 for _ in self.shards.glob("*.json"))
            self._finished_clips = finished * self.config.cache.clips_per_shard
        self.on_progress(BuildProgress("clips", min(self._finished_clips + own, plan.clips), plan.clips))

    def clip_pass(self, plan: units.BuildPlan) -> ClipPass:
        """How this worker makes units: all that are free, or one that somebody names."""
        return ClipPass(
            config=self.config,
            plan=plan,
            source=self.source,
            shards=self.shards,
            texts=self.work / "texts",
            quarantine=self._quarantine(plan),
            encoder=lambda: self.encoder,
            made_with=_environment(self.device),
            clock=self.clock,
            on_clip=lambda count: self._report_clips(plan, own=count),
        )

    def _quarantine(self, plan: units.BuildPlan) -> Quarantine:
        return Quarantine(
            self.out,
            shards=self.shards,
            clips=plan.clips,
            videos=plan.facts["unreadable_videos"],
            fraction=self.config.cache.max_quarantined_fraction,
        )

    @cached_property
    def encoder(self) -> ClipEncoder:
        vae: Any = self.wan.vae(self.encoder_dtype)
        with gpu_holds("the VAE", fix=LESS_MEMORY):
            vae.to(self.device)
        return ClipEncoder(
            vae,
            dtype=self.dtype,
            pixel_norm=self.config.cache.pixel_norm,
            batch_clips=self.config.cache.batch_clips,
            clock=self.clock,
            empty=self._empty,
        )


def _environment(device: torch.device) -> dict[str, str]:
    """What the bytes depend on beside the fingerprint: library versions and the kind of device."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    return {"device": kind, **{name: importlib.metadata.version(name) for name in _LIBRARIES}}
