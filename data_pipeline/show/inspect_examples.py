"""A few examples of a cache as pictures: frames and masks decoded from the stored latents.

The raw dataset is read only for the original frames, and only if it is unchanged. A VAE other than the one that made
the cache is refused, because its pictures would be wrong.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from flowmask.data_pipeline.cache.manifest import Fingerprint
from flowmask.data_pipeline.clip.clips import Geometry
from flowmask.data_pipeline.clip.pixels import from_signed
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.show.inspect_cache import OnProgress, naming_damage
from flowmask.data_pipeline.show.page import spread
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Video
from flowmask.models.device import gpu_holds, rank_device
from flowmask.models.errors import ConfigError, UserError, WeightsError
from flowmask.models.stored.typed import read_yaml
from flowmask.models.vae import decode
from flowmask.models.weights.wan import WanFolder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

CONFIG = "config.yaml"  # of the build: where its weights and its dataset were
_OTHERWISE = "give the folder of its weights with --wan, or --examples 0 for the numbers alone"
WITHOUT_GPU = "set CUDA_VISIBLE_DEVICES= to decode on the CPU"
_FRAMES = 5  # of each example, evenly spaced in its clip
_GEOMETRY = TypeAdapter(Geometry)


@dataclass(frozen=True)
class CachedExample:
    """One example from the cache; its n shown frames are at `places` of the clip.

    frames, originals: uint8 [n H W 3] rgb8, decoded and from the dataset (None if it cannot be read)
    decoded, true:     bool [n H W], from the mask's latent and from the record
    iou:               of the decoded mask with the true one over the whole clip; 1 if both are empty
    If some frames of a clip are not annotated, only the annotated ones count.
    """

    example_id: int
    record: dict[str, Any]
    expression: dict[str, Any]
    tokens: int
    places: list[int]
    frames: NDArray[np.uint8]
    originals: NDArray[np.uint8] | None
    decoded: NDArray[np.bool_]
    true: NDArray[np.bool_]
    iou: float

    @property
    def psnr_db(self) -> float | None:
        """Of the shown decoded frames, against the originals."""
        if self.originals is None:
            return None
        error = np.square(self.frames.astype(np.float64) - self.originals).mean()
        return 10 * math.log10(255**2 / max(error, 1e-9))


class ExampleDecoder:
    """A cache's VAE, and its dataset if that can still be read.

    `why_no_originals` is a sentence for a person; it is empty if originals can be shown.
    """

    def __init__(self, reader: CacheReader, *, wan: Path | None = None):
        """wan: the weights folder; by default the one in the build's config. ConfigError, WeightsError."""
        self.reader = reader
        config = _build_config(reader.folder / CONFIG)
        self.vae = vae_of(reader.folder, reader.manifest.fingerprint, wan=wan, otherwise=_OTHERWISE)
        self._videos, self.why_no_originals = _open_videos(reader, config)

    def draw(self, count: int, *, seed: int, on_progress: OnProgress = lambda *_: None) -> Iterator[CachedExample]:
        """At most `count` different examples, drawn uniformly from the whole cache, sorted by id."""
        total = self.reader.manifest.examples
        count = min(count, total)
        for done, example_id in enumerate(sorted(Random(mix64(seed)).sample(range(total), count))):
            on_progress("examples", done, count)
            yield self.decode(example_id)
        on_progress("examples", count, count)

    def decode(self, example_id: int) -> CachedExample:
        """Decode one example's clip and mask."""
        needs = {"video_mean", "mask_mean", "mask_pixels"}
        row = self.reader.index[example_id]
        with naming_damage(self.reader, example_id):
            parts = self.reader.read(np.array([example_id]), needs=needs, text_tokens=0)
            record = self.reader.record(example_id)
            expression = record["expressions"][int(row["expression"])]
        with gpu_holds(f"the decoded clip of example {example_id}", fix=WITHOUT_GPU):
            video = decode(self.vae, parts["video_mean"])[0]
            decoded = shown(self.vae, parts["mask_mean"][0])
        frames = from_signed(video.cpu(), pixel_norm=self.reader.manifest.pixel_norm)
        true = parts["mask_pixels"][0].numpy()
        known = np.flatnonzero(parts["annotated"][0]) if "annotated" in parts else np.arange(len(frames))
        places = known[spread(len(known), _FRAMES)].tolist()
        return CachedExample(
            example_id=example_id,
            record=record,
            expression=expression,
            tokens=int(row["text_tokens"]),
            places=places,
            frames=frames[places],
            originals=self._originals(record, places),
            decoded=decoded[places],
            true=true[places],
            iou=overlap(decoded[known], true[known]),
        )

    def _originals(self, record: dict[str, Any], places: list[int]) -> NDArray[np.uint8] | None:
        """uint8 [n H W 3], cut like the clip; None if a frame cannot be read."""
        video = self._videos.get((record.get("source", ""), record["video_id"]))
        if video is None:
            return None
        kept = {name: record[name] for name in ("resize", "crop", "size", "flip")}
        geometry = _GEOMETRY.validate_python({"source": record["source_size"], **kept})
        try:
            frames = video.frames([record["frame_ids"][place] for place in places])
        except (UserError, OSError):
            return None
        return np.stack([geometry.frame(frame) for frame in frames])


def shown(vae: "AutoencoderKLWan", latent: Tensor) -> NDArray[np.bool_]:
    """bool [F H W] from a raw latent [16 f h w]: the mean of the three channels, cut at grey."""
    return np.asarray((decode(vae, latent[None])[0].mean(0) > 0).cpu().numpy())


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """IoU of two bool [F H W] over a whole clip; 1 if both are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def _build_config(path: Path) -> CacheBuildConfig | None:
    """The config of the build; None if it is missing or of another version."""
    try:
        resolved = read_yaml(path)
        return CacheBuildConfig.model_validate({k: v for k, v in resolved.items() if k != "launch"})
    except (OSError, ValueError, AttributeError):
        return None


def vae_of(folder: Path, fingerprint: Fingerprint, *, wan: Path | None, otherwise: str) -> "AutoencoderKLWan":
    """The VAE that made the cache `folder`, from `wan` or from the place in the build's config.

    otherwise: advice for the message. ConfigError, WeightsError if the VAE is missing or another one.
    """
    if wan is None:
        config = _build_config(folder / CONFIG)
        wan = config.model.wan if config else None
    if wan is None:
        raise ConfigError(f"{folder / CONFIG} is missing or of another version, so its VAE is not known: {otherwise}")
    if not wan.is_dir():
        raise WeightsError(f"{wan}, whose VAE made the cache {folder}, is no folder: {otherwise}")
    weights = WanFolder(wan)
    theirs, ours = fingerprint.fields.get("model.vae"), weights.identity("vae")
    if ours != theirs:
        raise WeightsError(
            f"{wan}/vae is not the VAE that made {folder} ({ours[:12]}..., the cache says "
            f"{str(theirs)[:12]}...): {otherwise}"
        )
    vae: Any = weights.vae()
    with gpu_holds("the VAE", fix=WITHOUT_GPU):
        return vae.to(rank_device())


def _open_videos(reader: CacheReader, config: CacheBuildConfig | None) -> tuple[dict[tuple[str, str], Video], str]:
    """The datasets' videos by dataset name and video id; or none, and the reason."""
    if config is None:
        return {}, f"Originals are left out: {CONFIG} does not say where the dataset is."
    where = ", ".join(f"{data.root} (split {data.split})" for data in config.sources)
    try:
        source = open_source(config.sources)
        identity = source.identity()
    except (UserError, OSError):
        return {}, f"Originals are left out: the dataset {where} is out of reach."
    fields = reader.manifest.fingerprint.fields
    if any(fields.get(f"data.{name}") != value for name, value in identity.items()):
        return {}, f"Originals are left out: the dataset {where} is not what it was when the cache was made."
    return {(video.source, video.video_id): video for video in source.videos()}, ""
