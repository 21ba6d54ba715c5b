"""Evaluation during training: losses and J&F of the EMA weights on a fixed part of a (held-out) cache.

Uses a second module, so the trained one is not touched. Examples are distributed over the ranks and
computed one by one, so the numbers do not depend on the world size. J&F is measured on the cached clips, at
their size. The random streams of the training are neither used nor changed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.read.batches import Reader, caches_of, open_cache
from flowmask.data_pipeline.read.epoch_plan import spread
from flowmask.data_pipeline.read.loader import Batch
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.read.stream import StreamReader
from flowmask.models.config import ModelConfig
from flowmask.models.errors import CacheError, ConfigError
from flowmask.models.lora import named_parameters
from flowmask.models.segment import masks_at, sample_mask
from flowmask.models.vae import LatentStats, normalise
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.objectives.base import Objective
from flowmask.trainer.predict.conventions import segment_settings
from flowmask.trainer.predict.inference import mask_decoder_named
from flowmask.trainer.run.best import Definition, definition_of
from flowmask.trainer.run.diagnose import not_finite
from flowmask.trainer.run.validate_overlays import ClipOverlays
from flowmask.trainer.run.validate_whole import WholeVideos
from flowmask.trainer.run.validate_whole_start import whole_videos_of
from flowmask.trainer.score.metrics import Tally, shown_in, totals
from flowmask.trainer.step.ema import ShardedEma
from flowmask.trainer.validation_config import ValidationConfig

Found = dict[str, float]


class _Reader(Protocol):
    def read(self, example_ids: Any, *, needs: Any, text_tokens: int) -> dict[str, Tensor]: ...


@dataclass
class Validator:
    """The evaluation of a run; `measure` is collective.
    objective: without random noise (the video's latent is its posterior's mean); decoder: None if it is being trained
    build: makes a module like the trained one, float32 on the CPU; called once, at the first evaluation
    definition: settings that the numbers depend on, see `best.py`
    overlays: draws the first of the scored examples; None for no pictures
    whole: also scores whole videos; None for none
        whole: also scores whole videos; None for none
    """

    config: ValidationConfig
    model: ModelConfig
    reader: _Reader
    example_ids: Sequence[int]
    objective: Objective
    stats: LatentStats
    decoder: nn.Module | None
    build: Callable[[], nn.Module]
    dtype: torch.dtype
    definition: Definition
    overlays: ClipOverlays | None = None
    whole: WholeVideos | None = None
    _module: nn.Module | None = None

    def measure(
        self, ema: ShardedEma, *, step: int, stop: Callable[[], bool], pictures: Path | None = None
    ) -> Found | None:
        """eval_loss, eval_loss_t<timestep>, and eval_<name> of every metric, over the examples, on every rank.

        Also eval_whole_<name> at steps with whole videos. Returns None if a stop was requested meanwhile.
        pictures: folder for the overlay videos, shared by all ranks; stop: called by all ranks together
        """
        whole: Found | None = {}
        with _random_streams_kept(), torch.no_grad():
            module = self._filled(ema)
            mine = {place: self._measure_one(module, place, pictures) for place in self._places()}
            if self.whole is not None and self.config.scores_whole_videos(step):
                whole = self.whole.measure(module, stop=stop)
            module.to("cpu")
        if whole is None:
            return None
        rows: dict[int, tuple[Found, Tally | None]] = {}
        for share in distributed.gather_objects(mine):
            rows |= share
        losses, tallies = zip(*(rows[place] for place in sorted(rows)))
        found = {name: math.fsum(row[name] for row in losses) / len(losses) for name in losses[0]}
        scored = [tally for tally in tallies if tally is not None]
        total = totals([tally.scores() for tally in scored], [tally.sums() for tally in scored])
        shown = shown_in("validation")
        return found | {f"eval_{name}": value for name, value in total.items() if name in shown} | whole

    def refuse_unfit(self, caches: Sequence[Path | str]) -> None:
        """Read this rank's examples before the training starts. Raises CacheError for non-finite values."""
        checks = "; ".join(f"flowmask cache verify {cache}" for cache in caches)
        for place in self._places():
            for part, example in not_finite(self._read(place)):
                raise CacheError(f"evaluation: {part} of example {example} not finite; check what is read: {checks}")

    def _places(self) -> range:
        return range(distributed.rank(), len(self.example_ids), distributed.world_size())

    def _filled(self, ema: ShardedEma) -> nn.Module:
        """A whole module with the averaged weights, on this rank's device."""
        if self._module is None:
            self._module = self.build().eval().requires_grad_(False)
            for parameter in self._module.parameters():  # not the buffers: a rotary table keeps its dtype
                parameter.data = parameter.data.to(self.dtype)
        parameters = dict(named_parameters(self._module))
        for name, whole in ema.whole_tensors():
            parameters[name].data.copy_(whole)
        return self._module.to(distributed.device())

    def _measure_one(self, module: nn.Module, place: int, pictures: Path | None) -> tuple[Found, Tally | None]:
        """Losses of one example, and the scores of its mask if it is one of the sampled examples."""
        batch = self._read(place)
        losses = self._losses(module, batch)
        if place >= self.config.jf_examples:
            return losses, None
        predicted, truth = self._masks(module, batch)
        if self.overlays is not None and pictures is not None and place < self.config.overlays:
            self.overlays.write(pictures, self.example_ids[place], predicted=predicted, truth=truth)
        tally, known = Tally(), slice(None) if batch.annotated is None else batch.annotated[0].cpu().numpy()
        tally.add(truth[known], predicted[known])
        return losses, tally

    def _read(self, place: int) -> Batch:
        example = self.example_ids[place]
        needs = self.objective.needs | {"mask_pixels"}
        tokens = self.model.text_tokens
        tensors = self.reader.read(np.array([example]), needs=needs, text_tokens=tokens)
        batch = Batch(
            step=0,
            example_ids=torch.tensor([example]),
            positions=torch.tensor([place]),
            epochs=torch.zeros(1, dtype=torch.int64),
            keys=[example],
            digest=0,
            text_tokens=tokens,
            **tensors,  # type: ignore[arg-type]
        )
        return self.objective.prepare(batch).to(distributed.device())

    def _losses(self, module: nn.Module, batch: Batch) -> Found:
        if "timestep" not in batch.draws:
            return {"eval_loss": float(self.objective.loss(module, batch)[0])}
        found = {}
        for timestep in self.config.timesteps:
            batch.draws["timestep"] = torch.full_like(batch.draws["timestep"], timestep)
            found[f"eval_loss_t{timestep}"] = float(self.objective.loss(module, batch)[0])
        return {"eval_loss": math.fsum(found.values()) / len(found)} | found

    def _masks(self, module: nn.Module, batch: Batch) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """The predicted mask of one clip, sampled and decoded, and the true one: bool [F H W]."""
        assert batch.mask_pixels is not None
        latent, decoder = self._mask_latent(module, batch), self.decoder
        decode = module if decoder is None else decoder.to(distributed.device())
        truth = batch.mask_pixels[0].cpu().numpy()
        frames, height, width = truth.shape
        logits = decode(latent.float())[0, 0]
        if decoder is not None:
            decoder.to("cpu")
        return masks_at(logits.float(), frames=frames, size=(width, height)).cpu().numpy(), truth

    def _mask_latent(self, module: nn.Module, batch: Batch) -> Tensor:
        """Sampled from the video by the DiT, or the true one for a mask decoder; [1 16 f h w] raw."""
        if self.decoder is None:
            assert batch.mask_mean is not None
            return batch.mask_mean
        assert batch.video_mean is not None
        dit: Any = module
        return sample_mask(
            dit,
            video_latent=normalise(self.stats, batch.video_mean.float()),
            text=batch.padded_text(),
            settings=segment_settings(self.objective.settings(), sampler=self.config.sampler),
            stats=self.stats,
        )


def make_validator(
    config: RunConfig,
    training: Reader,
    *,
    objective: Objective,
    conventions: Mapping[str, Any],
    build: Callable[[], nn.Module],
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> Validator:
    """The validator of a run; raises UserError if the held-out cache, the mask decoder or the whole videos do not fit.

    objective: without random noise; build: makes another module like the trained one, with any weights
    conventions: of the weights, as a checkpoint has them
    say: receives message lines: the evaluated examples, a picture that can't be written, a video that can't be scored
    """
    settings = config.evaluate
    reader: Reader = training
    if settings.cache is not None:
        reader = open_cache(settings.cache, config.data)
        refuse_other_conventions(reader, training)
        objective.check_cache(reader.manifest, where=settings.cache)
        reader.check_text_tokens(config.model.text_tokens)
    stats = LatentStats.from_lists(training.manifest.latents_mean, training.manifest.latents_std)
    decoder, overlays, whole, decoder_sha256 = None, None, None, None
    with _random_streams_kept():
        if objective.makes == "dit" and (settings.jf_examples or settings.whole_videos):
            vae: Any = WanFolder(config.model.wan).vae()
            decoder, decoder_sha256 = mask_decoder_named(config.model.mask_decoder, vae)
            decoder.eval().requires_grad_(False)
            if settings.whole_videos is not None:
                whole = whole_videos_of(
                    config,
                    settings=conventions,
                    fields=training.manifest.fingerprint.fields,
                    caches=[cache for cache in caches_of(training) if isinstance(cache, CacheReader)],
                    vae=vae,
                    decoder=(decoder, decoder_sha256),
                    say=say,
                )
        # the first examples are on the first ranks; the others need no second VAE
        draws = distributed.rank() < min(settings.jf_examples, settings.overlays)
        if draws and not isinstance(reader, StreamReader):
            overlays = ClipOverlays(reader, WanFolder(config.model.wan).vae(), say=say)
    examples = fixed_examples(reader.buckets, settings.examples)
    cache, whole_definition = reader.manifest.fingerprint.total, None if whole is None else whole.definition
    definition = definition_of(settings, cache=cache, decoder=decoder_sha256, whole_videos=whole_definition)
    validator = Validator(
        settings, config.model, reader, examples, objective, stats, decoder, build, dtype, definition, overlays, whole
    )
    validator.refuse_unfit([settings.cache] if settings.cache is not None else config.data.folders())
    whose = settings.cache or f"{config.data.caches}, which is also the training data: set evaluate.cache"
    for what in (f"{len(examples)} examples of {whose}", *([whole] if whole is not None else [])):
        say(f"evaluating on {what}")
    return validator


def fixed_examples(buckets: Sequence[Bucket], count: int) -> list[int]:
    """`count` example ids of the first view, spread over the cache by a fixed permutation.

    All if there are fewer; raises ConfigError if there are none.
    """
    counts = np.array([bucket.counts[0] for bucket in buckets], dtype=np.int64)
    total = int(counts.sum())
    if not total:
        raise ConfigError("evaluate.cache has no example in its first view; build it with other clips")
    chosen = spread(count, total)
    ends = np.cumsum(counts)
    where = np.searchsorted(ends, chosen, side="right")
    firsts = np.array([bucket.first[0] for bucket in buckets], dtype=np.int64)
    return [int(i) for i in firsts[where] + chosen - (ends - counts)[where]]


def refuse_other_conventions(held_out: CacheReader, training: Reader) -> None:
    """Raises ConfigError if the held-out cache was encoded with other settings than the training's."""
    ours, theirs = training.manifest, held_out.manifest
    for name in ("pixel_norm", "lowercase", "latents_mean", "latents_std", "text_dim"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(
                f"evaluate.cache {held_out.folder} has {name} {getattr(theirs, name)}, the training's cache "
                f"has {getattr(ours, name)}; build both with the same settings"
            )


@contextmanager
def _random_streams_kept() -> Iterator[None]:
    device = distributed.device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def describe(found: Mapping[str, float]) -> str:
    """One line with the measured values."""
    parts = [f"{name.removeprefix('eval_').replace('_', ' ')} {value:.5g}" for name, value in found.items()]
    return ", ".join(parts)
