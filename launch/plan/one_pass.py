"""Cost of one micro-batch on a rank: the run's objective and module, run on the meta device (dry_run.py)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.model import Architecture, objective_of, trained_module
from flowmask.models.config import Recompute
from flowmask.models.cost.dry_run import Pass, dry_pass

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

    @property
    def pixels(self) -> int:
        return self.frames * self.height * self.width

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
) -> Pass:
    """Forward and backward of one micro-batch on one rank.

    every_layer: run all blocks of the DiT, which is slow, instead of extrapolating from two and three.
    """
    objective, text_dim = objective_of(job), shapes.dit_config["text_dim"]
    dtype = torch.bfloat16 if job.train.precision == "bf16" else torch.float32
    ranks = job.train.sequence_parallel
    latent, share = _latent_share(shape.latent, ranks)

    def run(module: nn.Module) -> Tensor:
        batch = objective.fake_batch(latent, examples=job.train.micro_batch, text_dim=text_dim)
        return objective.loss(module, batch)[0]

    def measure(layers: int | None) -> Pass:
        module = trained_module(job, shapes, layers=layers)
        if recompute != "none":
            objective.recompute(module, recompute)
        return dry_pass(module, run, dtype=dtype, like_a_gpu=like_a_gpu)

    depth = shapes.dit_config["num_layers"]
    if every_layer or not objective.has_blocks or depth <= _MORE:
        return measure(None).scaled(share)
    return measure(_FEW).extended(measure(_MORE), depth - _FEW).scaled(share)


def batch_bytes(job: TrainJob, shape: Shape, *, text_dim: int) -> float:
    """Bytes of one micro-batch from the loader; text is padded to its longest sentence (here: full)."""
    objective = objective_of(job)
    with torch.device("meta"):
        batch = objective.fake_batch(shape.latent, examples=job.train.micro_batch, text_dim=text_dim)
    return sum(getattr(batch, name).nbytes for name in objective.needs)


def _latent_share(latent: tuple[int, int, int], ranks: int) -> tuple[tuple[int, int, int], float]:
    """A grid of about 1 / ranks of the tokens, and the factor for its cost.

    Ulysses gives each rank its share of the tokens and, for attention, its share of the heads: in both cases 1 / ranks
    of each tensor.
    """
    f, h, w = latent
    if ranks == 1:
        return latent, 1.0
    height = max(2, round(h / ranks / 2) * 2)
    return (f, height, w), h / ranks / height
