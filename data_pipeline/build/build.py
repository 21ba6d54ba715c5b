"""`flowmask cache build`: its phases, run by any number of independent workers.

Plan (once), sentences, clips, finalise. Finished units are found on the disk. So the same command continues a
killed build, and the result has the same bytes for any number of workers and interruptions.
"""

import gc
import importlib.metadata
import platform
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flowmask.data_pipeline.build import finalise, sentences
from flowmask.data_pipeline.build.clip_pass import ClipPass
from flowmask.data_pipeline.build.encode import LESS_MEMORY, ClipEncoder
from flowmask.data_pipeline.build.progress import BuildProgress, OnProgress, ProgressCount
from flowmask.data_pipeline.build.sharing import SharedBuild
from flowmask.data_pipeline.build.stage_clock import StageClock
from flowmask.data_pipeline.build.warm_up import measure
from flowmask.data_pipeline.cache.manifest import Fingerprint
from flowmask.data_pipeline.cache.quarantine import Quarantine
from flowmask.data_pipeline.cache.shards import listed_units
from flowmask.data_pipeline.claim.claims import claimed, share_out
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.plan import units
from flowmask.data_pipeline.plan.cost import describe
from flowmask.data_pipeline.plan.fingerprint import fingerprint, refuse_other
from flowmask.data_pipeline.plan.leaks import LeakFree, without_leaks
from flowmask.data_pipeline.plan.plan_file import listed_text_units
from flowmask.data_pipeline.sources import open_source
from flowmask.models.device import gpu_holds, rank_device, use_tf32
from flowmask.models.errors import CacheError
from flowmask.models.folders.output_folder import OutputFolder
from flowmask.models.text import TextEncoder
from flowmask.models.weights.wan import WanFolder

_LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "pillow", "numpy", "safetensors")


def build(
    config: CacheBuildConfig, *, worker: int = 0, workers: int = 1, on_progress: OnProgress | None = None
) -> None:
    """Work on the cache `config.out` until it is complete; any number of processes may do so at once.

    `worker` of `workers` only spreads the places where workers begin. A complete cache of the same fingerprint is
    not changed (the last progress says "complete"). Another fingerprint is refused: CacheError with the differing
    fields.
    """
    Build(config, worker=worker, workers=workers, on_progress=on_progress or (lambda _: None)).run()


class Build:
    """One worker's part of a build."""

    def __init__(
        self, config: CacheBuildConfig, *, worker: int = 0, workers: int = 1, on_progress: OnProgress = lambda _: None
    ):
        self.config, self.worker, self.workers, self.on_progress = config, worker, workers, on_progress
        self.out = Path(config.out)
        self.shared = SharedBuild(self.out, config.cache.lease_s, worker=worker, workers=workers)
        self.work, self.shards, self.finished = self.shared.work, self.shared.shards, self.shared.finished
        self.device = rank_device(config.cache.device, key="cache.device")
        self.dtype: torch.dtype = getattr(torch, config.cache.dtype)
        self.encoder_dtype: torch.dtype = getattr(torch, config.cache.encoder_dtype)
        use_tf32(config.cache.tf32)
        self.wan, self.clock = WanFolder(config.model.wan), StageClock()
        self._empty: dict[tuple[int, ...], torch.Tensor] = {}  # latents of empty masks: kept when the VAE is freed
        if self.device.type == "cpu":
            # The number of threads changes sums: bytes must not depend on the number of workers on a machine.
            torch.set_num_threads(1)

    def run(self) -> None:
        try:
            self.on_progress(BuildProgress("plan", 0, 1))
            self.source.videos()  # bad input is refused before anything is written
            plan = self._plan()
            if not self.finished.exists():
                self._encode(plan)
        finally:
            if self.finished.exists():  # also when refused: a finished cache is not changed
                finalise.clear_work(self.work)
        self.on_progress(BuildProgress("complete", plan.clips, plan.clips))

    def _encode(self, plan: units.BuildPlan) -> None:
        try:
            self._tell_cost(plan)
            self._encode_sentences(plan)
            self._encode_clips(plan)
            self.on_progress(BuildProgress("finalise", 0, 1))
            self._quarantine(plan).check()
            self.shared.finalise(plan, make=self.clip_pass(plan).write_unit)
        except (CacheError, FileNotFoundError):
            if not self.finished.exists():
                raise  # else other workers have finished and removed `work` while this one still ran

    @cached_property
    def source(self) -> LeakFree:
        return without_leaks(open_source(self.config.data), self.config)

    def _plan(self) -> units.BuildPlan:
        """The plan on disk, written if there is none; refuses a plan or a cache with another fingerprint."""
        folder = self.out / units.FOLDER
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if units.read_plan(folder) is None:
                OutputFolder(self.out, units.CACHE)
            self.shards.mkdir(exist_ok=True)
        except OSError as error:
            raise CacheError(f"cannot write {self.shards}: {error.strerror}; choose another `out`") from error
        plan = self.shared.plan(self._write_plan)
        refuse_other(self._fingerprint(), plan.fingerprint, where=self.out)
        return plan

    def _fingerprint(self) -> Fingerprint:
        return fingerprint(self.config, self.source, memo=self.work / "weights.json")

    def _write_plan(self, folder: Path) -> None:
        if self.finished.exists():
            raise CacheError(f"{self.out} holds a cache without its plan; choose another `out`, or delete it")
        self.plan_into(folder, fingerprint=self._fingerprint())

    def plan_into(self, folder: Path, *, fingerprint: Fingerprint) -> None:
        """Write this build's plan into any folder; first, DataError for objects that no mask contains."""
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

    def _encode_sentences(self, plan: units.BuildPlan) -> None:
        texts = self.shared.texts
        texts.mkdir(parents=True, exist_ok=True)
        counted = ProgressCount(lambda: listed_text_units(texts), per_unit=units.SENTENCES_PER_UNIT, total=plan.texts)

        def work(unit: int) -> None:
            with self.clock.measure("text"):
                self.write_text_unit(plan, unit, folder=texts)
            self.on_progress(BuildProgress("text", counted.after(units.SENTENCES_PER_UNIT), plan.texts))

        self.on_progress(BuildProgress("text", 0, plan.texts))
        share_out(self.shared.sentences(plan), work)
        self.free("text_encoder")

    def write_text_unit(self, plan: units.BuildPlan, unit: int, *, folder: Path) -> None:
        """Encode the sentences of a unit; the text encoder stays loaded."""
        together = self.config.cache.batch_sentences
        texts, encoder = plan.unit_texts(unit), self.text_encoder
        sentences.write_unit(folder, unit, texts, encoder=encoder, dtype=self.dtype, together=together)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Loaded by a worker that has sentences to encode; freed before the VAE is loaded."""
        loaded = self.wan.text_encoder(self.encoder_dtype)
        with gpu_holds("the text encoder", fix=sentences.LESS_MEMORY):
            loaded.model.to(self.device)
        return loaded

    def free(self, name: str) -> None:
        """Free the memory of an encoder: the VAE and the text encoder are never on a device together."""
        self.__dict__.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _tell_cost(self, plan: units.BuildPlan) -> None:
        """Report the expected cost of the build after encoding one clip and one sentence; once, before any storing."""
        texts = self.shared.texts
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
        counted = ProgressCount(
            lambda: listed_units(self.shards), per_unit=self.config.cache.clips_per_shard, total=plan.clips
        )

        def report(more: int, in_hand: int) -> None:
            self.on_progress(BuildProgress("clips", counted.after(more, in_hand=in_hand), plan.clips))

        report(0, 0)
        make = replace(self.clip_pass(plan), on_clip=lambda in_hand: report(1, in_hand))
        make.run(lambda: claimed(self.shared.clips(plan)))

    def clip_pass(self, plan: units.BuildPlan) -> ClipPass:
        """Makes this worker's units: all free units, or one given unit."""
        return ClipPass(
            config=self.config,
            plan=plan,
            source=self.source,
            shards=self.shards,
            embeddings=sentences.Embeddings(self.shared.texts),
            quarantine=self._quarantine(plan),
            encoder=lambda: self.encoder,
            made_with=_environment(self.device),
            clock=self.clock,
        )

    def _quarantine(self, plan: units.BuildPlan) -> Quarantine:
        return Quarantine(
            self.out,
            shards=self.shards,
            clips=plan.clips,
            videos=plan.facts["unreadable_videos"] * self.config.cache.views,
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
    """Facts that shape the bytes and are not in the fingerprint: library versions and the kind of device."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    return {"device": kind, **{name: importlib.metadata.version(name) for name in _LIBRARIES}}
