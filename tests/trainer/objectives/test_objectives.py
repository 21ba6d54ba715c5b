"""The objectives: draws depend on keys alone, spaces are right, and the loss is the same with and without a cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from objective_lab import ExactVelocity, SilentVelocity, batch_of, make
from runs import GOLDEN

from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.read.loader import Batch
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.models.vae import LatentStats, encode_mask, encode_moments
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.objectives.base import read_metrics


def test_every_draw_is_a_function_of_the_examples_key_alone() -> None:
    objective = make()
    together = objective.prepare(batch_of([11, 12, 13]))
    alone = [objective.prepare(batch_of([key])) for key in (13, 11, 12)]
    order = (1, 2, 0)
    assert torch.equal(together.draws["timestep"], torch.cat([alone[i].draws["timestep"] for i in order]))
    assert torch.equal(objective.noise(together), torch.cat([objective.noise(alone[i]) for i in order]))


def test_with_boundary_bias_half_the_timesteps_are_1000_and_the_rest_uniform_below() -> None:
    keys = [mix64(7, i) for i in range(4000)]
    timestep = make().prepare(batch_of(keys)).draws["timestep"]
    assert abs((timestep == 1000).float().mean() - 0.5) < 0.03
    rest = timestep[timestep < 1000].float()
    assert rest.min() >= 1 and abs(rest.mean() - 500) < 25 and abs(rest.std() - 289) < 15


def test_without_boundary_bias_timesteps_are_uniform_over_all() -> None:
    keys = [mix64(8, i) for i in range(4000)]
    timestep = make(boundary_bias=False).prepare(batch_of(keys)).draws["timestep"].float()
    assert timestep.min() >= 1 and timestep.max() <= 1000 and (timestep == 1000).float().mean() < 0.01
    assert abs(timestep.mean() - 500.5) < 20 and abs(timestep.std() - 288.7) < 10


@pytest.mark.parametrize("norm", ["none", "video"])
def test_an_exact_velocity_has_no_loss_whatever_the_masks_norm(norm: str) -> None:
    objective = make(boundary_probability=0.0, mask_latent_norm=norm)
    batch = objective.prepare(batch_of([1, 2, 3]))
    batch.draws["timestep"] = torch.tensor([1, 300, 700])
    assert objective.loss(ExactVelocity(), batch)[0] < 1e-8


def test_the_video_is_sampled_then_normalised_and_the_mask_is_left_raw() -> None:
    batch = make().prepare(batch_of([5]))
    video, mask = make()._endpoints(batch)
    sample = batch.video_mean + torch.exp(batch.video_logvar / 2) * make().noise(batch)
    assert torch.allclose(video, (sample - 0.5) / 2) and torch.equal(mask, batch.mask_mean)
    plain = make(start_point_augmentation=False).prepare(batch_of([5]))
    assert torch.equal(make(start_point_augmentation=False)._endpoints(plain)[0], (batch.video_mean - 0.5) / 2)


def test_metrics_split_the_loss_into_the_boundary_and_the_rest() -> None:
    objective = make()
    batch = objective.prepare(batch_of([1, 2, 3, 4]))
    batch.draws["timestep"] = torch.tensor([1000, 10, 1000, 500])
    loss, metrics = objective.loss(SilentVelocity(), batch)
    means = read_metrics({name: float(value) for name, value in metrics.items()})
    assert loss == pytest.approx((means["loss_at_video"] + means["loss_elsewhere"]) / 2, rel=1e-6)
    assert read_metrics({"a_sum": 1.0, "a_count": 0.0}) == {}


@pytest.fixture(scope="module")
def reader(lab: Path) -> Iterator[CacheReader]:
    reader = CacheReader(lab / "cache")
    yield reader
    reader.close()


def cached(reader: CacheReader, objective: Any, ids: list[int]) -> Batch:
    count = torch.arange(len(ids))
    tensors: dict[str, Any] = reader.read(np.array(ids), needs=objective.needs, text_tokens=256)
    keys = [mix64(0, example) for example in ids]
    batch = Batch(step=0, example_ids=count, positions=count, epochs=count, keys=keys, digest=0, **tensors)
    return objective.prepare(batch)


@torch.no_grad()
def on_the_fly(reader: CacheReader, objective: Any, ids: list[int], *, wan: WanFolder) -> Batch:
    """The same examples from the raw dataset: read, resized, flipped and encoded here, one by one, in fp32."""
    from flowmask.data_pipeline.clip.pixels import resize_frame, resize_masks, to_signed
    from flowmask.data_pipeline.config import DataSourceConfig
    from flowmask.data_pipeline.sources import open_source
    from flowmask.models.text import pad

    videos = {v.video_id: v for v in open_source(DataSourceConfig(root=GOLDEN, split="valid_u")).videos()}
    vae, encode_text = wan.vae(), wan.text_encoder()
    batch = cached(reader, objective, ids)
    rows = []
    for example in ids:
        record = reader.record(example)
        said = record["expressions"][int(reader.index[example]["expression"])]
        video, size, side = videos[record["video_id"]], tuple(record["size"]), -1 if record["flip"] else 1
        frames = [resize_frame(f, size=size)[:, ::side].copy() for f in video.frames(record["frame_ids"])]
        annotations = record["masks"][said["mask"]]["anno_ids"]
        pixels = resize_masks(video.mask(annotations, record["frame_ids"]), size=size)[:, :, ::side].copy()
        mean, logvar = encode_moments(vae, to_signed(frames)[None])
        mask = torch.from_numpy(pixels)[None]
        text = pad(encode_text(said["text"], max_tokens=256), 256)[None]
        rows.append((mean, logvar, encode_mask(vae, mask), text, mask))
    columns = [torch.cat(column) for column in zip(*rows)]
    batch.video_mean, batch.video_logvar, batch.mask_mean, batch.text, batch.mask_pixels = columns
    return objective.prepare(batch)


@pytest.mark.parametrize("kind", ["flow_matching", "mask_decoder"])
def test_a_cached_batch_has_the_loss_of_the_same_clips_encoded_on_the_fly(
    lab: Path, reader: CacheReader, kind: str
) -> None:
    stats = LatentStats.from_lists(reader.manifest.latents_mean, reader.manifest.latents_std)
    objective = make(kind, stats=stats, wan=lab / "wan")
    torch.manual_seed(0)
    module = objective.build()
    assert {reader.record(example)["flip"] for example in range(16)} == {True, False}
    for bucket in reader.buckets:
        ids = [first + place for first, count in zip(bucket.first, bucket.counts) for place in range(count)]
        raw = on_the_fly(reader, objective, ids, wan=WanFolder(lab / "wan"))
        with torch.no_grad():
            loss = float(objective.loss(module, cached(reader, objective, ids))[0])
            exact = float(objective.loss(module, raw)[0])
        assert loss == pytest.approx(exact, rel=2**-8)


def test_noise_on_the_decoders_input_is_drawn_from_the_key_at_the_asked_size() -> None:
    objective = make("mask_decoder", latent_noise_std=0.3)
    batch = objective.prepare(batch_of([1, 2], shape=(16, 2, 8, 8)))
    assert batch.draws["noise"].std() == pytest.approx(0.3, rel=0.05)
    alone = objective.prepare(batch_of([2], shape=(16, 2, 8, 8)))
    assert torch.equal(alone.draws["noise"][0], batch.draws["noise"][1])
    assert not make("mask_decoder").prepare(batch_of([1])).draws


class Decoder(torch.nn.Module):
    """Stands for a decoder: its logits are the latent's first channel, enlarged; frames are independent."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latent[:, :1], scale_factor=(1, 2, 2))


def decoder_batch(keys: list[int], annotated: torch.Tensor | None) -> Batch:
    batch = batch_of(keys, shape=(16, 5, 4, 4))
    batch.mask_pixels = torch.stack(
        [torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(key)) > 0.6 for key in keys]
    )
    batch.annotated = annotated
    return batch


def test_the_decoders_loss_is_that_of_the_annotated_frames_alone() -> None:
    objective, keys = make("mask_decoder"), [3, 4, 5]
    annotated = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    annotated[:, 2] = True
    whole = decoder_batch(keys, annotated)
    assert whole.mask_mean is not None and whole.mask_pixels is not None
    alone = []
    for place, key in enumerate(keys):
        batch = decoder_batch([key], None)
        assert batch.mask_mean is not None and batch.mask_pixels is not None
        batch.mask_mean = batch.mask_mean[:, :, annotated[place]]
        batch.mask_pixels = batch.mask_pixels[:, annotated[place]]
        alone.append(objective.loss(Decoder(), batch)[0])
    whole.mask_mean.requires_grad_(True)
    loss, sums = objective.loss(Decoder(), whole)
    assert torch.allclose(loss, torch.stack(alone).mean(), rtol=1e-6)
    loss.backward()
    assert whole.mask_mean.grad is not None
    moved = whole.mask_mean.grad[:, 0].abs().sum((-1, -2)) > 0
    assert torch.equal(moved, annotated), "no gradient comes from a frame that nobody annotated"
    assert {"focal_sum", "dice_sum"} <= sums.keys()


def test_the_decoders_loss_is_the_same_where_all_frames_are_annotated() -> None:
    objective = make("mask_decoder")
    plain = objective.loss(Decoder(), decoder_batch([3, 4], None))[0]
    said = objective.loss(Decoder(), decoder_batch([3, 4], torch.ones(2, 5, dtype=torch.bool)))[0]
    assert torch.allclose(plain, said, rtol=1e-6)
