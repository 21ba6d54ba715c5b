"""The training engine: one optimizer step at any ZeRO stage and precision; the only importer of DeepSpeed.

Owns what must be the same everywhere: fp32 masters that start as the exact initial weights, gradients averaged over
the global batch, one decision of all ranks to take or skip a step. Refuses nothing about data or objectives.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer import fragments as layout
from trainer.config import TrainConfig, accumulation_steps
from trainer.fragments import Fragment
from trainer.optimizer import ArmedAdamW, ReplicatedAdamW

_BUCKET_ELEMENTS = 50_000_000
_LIMB = 1 << 16


class MicroBatch(Protocol):
    """What the engine itself reads of a micro-batch."""

    digest: int


class Objective(Protocol):
    """A loss: the mean over the micro-batch's examples, a scalar that needs gradients, and detached metrics."""

    def loss(self, module: nn.Module, batch: Any, /) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Call `module` (its parameters have the engine's `dtype`) once; returns the loss and its parts."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank; means are over the global batch, in full precision."""

    loss: float
    grad_norm: float  # before clipping; nan when skipped
    skipped: bool  # a non-finite loss or norm somewhere: weights, moments and step count are untouched
    digest: int  # sum of the micro-batches' digests over all ranks, mod 2^64
    metrics: dict[str, float] = field(default_factory=dict)
