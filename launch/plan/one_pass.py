"""What one micro-batch of a run costs a rank: its own objective and module, run on fake tensors (dry_run.py)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowmask.data_pipeline.read.loader import Batch
from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.model import Architecture, set_recompute, trained_module
from flowmask.models.cost.dry_run import Pass, dry_pass
from flowmask.models.dit import LATENT_CHANNELS, Recompute
from flowmask.models.vae import LatentStats
from flowmask.trainer.objectives.objectives import Objective, objective_named

_FEW, _MORE = 2, 3  # blocks: cost is linear in their number from the second on


@dataclass(frozen=True)
class Shape:
    """A clip shape in px."""

    frames: int
    height: int
    width: int

    @property
    def latent(self) -> tuple[int, int, int]:
        """f, h, w."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def micro_batch_pass(
    job: TrainJob,
    shapes: Architecture,
    shape: Shape,
    *,
    recompute: Recompute,
    like_a_gpu: bool = True,
    every_layer: bool = False,
) -> Pass | None:
    """Forward and backward of one micro-batch on one rank; None if the module can't be run so.

    every_layer: run all blocks of the DiT, which is slow, in place of two and three.
    """
    objective = objective_of(job)
    dtype = torch.bfloat16 if job.train.precision == "bf16" else torch.float32
    ranks = job.train.sequence_parallel
    latent, share = _latent_share(shape.latent, ranks)

    def run(module: nn.Module) -> Tensor:
        return objective.loss(module, fake_batch(job, latent, text_dim=shapes.dit_config["text_dim"]))[0]

    def measure(layers: int | None) -> Pass | None:
        module = trained_module(job, shapes, layers=layers)
        if not set_recompute(module, recompute):
            return None
        return dry_pass(module, run, dtype=dtype, like_a_gpu=like_a_gpu)

    depth = shapes.dit_config["num_layers"]
    if every_layer or job.objective.kind != "flow_matching" or depth <= _MORE:
        found = measure(None)
    else:
        few, more = measure(_FEW), measure(_MORE)
        found = few.extended(more, depth - _FEW) if few is not None and more is not None else None
    return None if found is None else found.scaled(share)


def _latent_share(latent: tuple[int, int, int], ranks: int) -> tuple[tuple[int, int, int], float]:
    """A grid of about 1 / ranks of the tokens, and what its cost is to be multiplied by.

    Ulysses gives each rank its share of the tokens, and for attention its share of the heads: both ways 1 / ranks of
    each tensor.
    """
    f, h, w = latent
    if ranks == 1:
        return latent, 1.0
    height = max(2, round(h / ranks / 2) * 2)
    return (f, height, w), h / ranks / height


def fake_batch(job: TrainJob, latent: tuple[int, int, int], *, text_dim: int) -> Batch:
    """A micro-batch with everything that the objective needs, empty."""
    b, (f, h, w) = job.train.micro_batch, latent
    moments = (b, LATENT_CHANNELS, f, h, w)
    batch = Batch(
        step=0,
        example_ids=torch.arange(b),
        positions=torch.arange(b),
        epochs=torch.zeros(b, dtype=torch.int64),
        keys=[0] * b,
        digest=0,
        mask_mean=torch.zeros(moments, dtype=torch.bfloat16),
    )
    if job.objective.kind == "mask_decoder":
        batch.mask_pixels = torch.zeros(b, 4 * f - 3, 8 * h, 8 * w, dtype=torch.bool)
        return batch
    batch.video_mean, batch.video_logvar = (torch.zeros(moments, dtype=torch.bfloat16) for _ in range(2))
    batch.text_tokens = job.model.text_tokens
    batch.text = torch.zeros(b, job.model.text_tokens, text_dim, dtype=torch.bfloat16)
    batch.draws = {"timestep": torch.full((b,), 500), "eps": torch.zeros(moments)}
    return batch


def batch_bytes(job: TrainJob, shape: Shape, *, text_dim: int) -> float:
    """Bytes of one micro-batch as the loader hands it over, text not padded to more than its longest (here: all)."""
    f, h, w = shape.latent
    values = LATENT_CHANNELS * f * h * w
    if job.objective.kind == "mask_decoder":
        return job.train.micro_batch * (2 * values + shape.frames * shape.height * shape.width)
    return job.train.micro_batch * (3 * 2 * values + 2 * job.model.text_tokens * text_dim)


def objective_of(job: TrainJob) -> Objective:
    """The objective of a run, without the latents' statistics: they change no shape."""
    ones: Any = [1.0] * LATENT_CHANNELS
    return objective_named(job.objective, model=job.model, stats=LatentStats.from_lists(ones, ones))
