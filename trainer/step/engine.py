"""The training engine: one optimizer step at any ZeRO stage and precision.

Keeps everything equal at all stages: fp32 masters that start as the exact initial weights, gradients averaged over
the global batch, and one decision of all ranks to take or skip a step. Does not check data or objectives.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowmask.models.lora import named_parameters
from flowmask.trainer import distributed
from flowmask.trainer.phases import Phases
from flowmask.trainer.step import fragments as layout
from flowmask.trainer.step import optimizer8bit, zero
from flowmask.trainer.step.fragments import Fragment
from flowmask.trainer.step.optimizer import ArmedAdamW, NamedTensors, ReplicatedAdamW, decay_groups
from flowmask.trainer.train_config import TrainConfig, accumulation_steps

_LIMB, _SHIFTS = 1 << 16, (0, 16, 32, 48)  # parts of a digest; their sums are exact in float64


class MicroBatch(Protocol):
    """The attributes of a micro-batch that the engine reads."""

    digest: int


class Loss(Protocol):
    """A loss: the mean over the micro-batch's examples, a scalar with a graph, and detached metrics."""

    def loss(self, module: nn.Module, batch: Any, /) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Call `module` (its parameters have the engine's `dtype`) once; returns the loss and metrics, all scalars."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank; means are over the global batch, in full precision."""

    loss: float
    grad_norm: float  # before clipping; nan when it or the loss is not finite
    skipped: bool  # not finite, or above a limit: weights, moments and step count are unchanged
    digest: int  # sum of the micro-batches' digests over all ranks, mod 2^64
    metrics: dict[str, float] = field(default_factory=dict)


class Engine:
    """A module under training. Construction and the public methods are collective: all ranks call them.

    `module` comes with its initial weights in fp32, equal on every rank (rank 0's are used). Parameters
    without gradient stay frozen, only in the working precision: no master, no moments, no fragment. Afterwards
    the parameters have the working precision, under ZeRO 3 only this rank's share: read weights through
    `full_state_dict`, never from the module. A single process has nothing to shard, so without
    `train.offload_optimizer` it always runs ZeRO 0. Raises ConfigError if the batch does not divide. phases: the
    stopwatch that records forward and backward passes and the optimizer.
    """

    def __init__(self, module: nn.Module, *, train: TrainConfig, phases: Phases | None = None):
        distributed.init()
        self._phases = phases or Phases()
        if train.optimizer == "adamw8bit":
            optimizer8bit.require()
        self.accumulation = accumulation_steps(train, distributed.world_size())
        self._sequence_ranks = train.sequence_parallel
        self.dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.zero_stage = zero.effective_stage(train, distributed.world_size())
        self.updates = 0
        trained = [(name, p) for name, p in named_parameters(module) if p.requires_grad]
        self.shapes = {name: tuple(p.shape) for name, p in trained}
        exact = self._place(module, keep_exact=self.zero_stage > 0 and self.dtype != torch.float32)
        self._optimizer = self._make_optimizer(module, train)
        config = zero.config(train, world=distributed.world_size())
        self._deepspeed = zero.initialize(module, self._optimizer, config)
        self.module: nn.Module = self._deepspeed.module
        self._optimizer.create_state(self._flat_masters())
        self._held = self._enumerate(owned=False)
        self._owned = self._enumerate(owned=True)
        for piece in self._held if exact else ():
            piece.master.copy_(exact[piece.name].flatten()[piece.start : piece.start + piece.numel])

    def _place(self, module: nn.Module, *, keep_exact: bool) -> dict[str, Tensor]:
        """Copy rank 0's weights to every device; keep_exact: in the working precision, with fp32 copies in host memory.

        One parameter at a time: if masters are sharded, a device never holds the whole module in fp32.
        """
        exact = {}
        for name, parameter in named_parameters(module):
            wide = parameter.requires_grad
            data = parameter.data.to(distributed.device(), torch.float32 if wide else self.dtype).contiguous()
            data = distributed.broadcast(data)
            if wide and keep_exact:
                exact[name] = data.cpu()
                data = data.to(self.dtype)
            parameter.data = data
        module.to(distributed.device()).train()  # also the buffers; a float64 rotary table keeps its dtype
        return exact

    def _make_optimizer(self, module: nn.Module, train: TrainConfig) -> ArmedAdamW:
        trained: NamedTensors = [(name, p) for name, p in named_parameters(module) if p.requires_grad]
        groups = decay_groups(trained, exclude=train.weight_decay_exclude)
        adam: dict[str, Any] = {"lr": train.lr, "betas": train.betas, "eps": train.eps}
        adam["decay"] = train.weight_decay if groups[0] else 0.0
        groups = [group for group in groups if group]
        eight = train.optimizer == "adamw8bit"
        if self.zero_stage > 0:
            return (optimizer8bit.ArmedAdamW8bit if eight else ArmedAdamW)(groups, **adam)
        replicated = optimizer8bit.ReplicatedAdamW8bit if eight else ReplicatedAdamW
        return replicated(groups, working_dtype=self.dtype, grad_clip=train.grad_clip, **adam)

    def _flat_masters(self) -> list[Tensor]:
        if self.zero_stage == 3:
            return list(self._deepspeed.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _enumerate(self, *, owned: bool) -> list[Fragment]:
        if isinstance(self._optimizer, ReplicatedAdamW):
            return layout.replicated(self._optimizer, owned=owned)
        if self.zero_stage == 3:
            return layout.partitioned(self.module, self._optimizer, zero=self._deepspeed.optimizer)
        return layout.flat_partition(self.module, self._optimizer)

    def fragments(self) -> list[Fragment]:
        """This rank's share of the masters and moments: over all ranks, every element exactly once."""
        return self._owned

    def held_fragments(self) -> list[Fragment]:
        """All fragments on this rank, to be filled by a load: everything at ZeRO 0, else `fragments()`.

        Values written to their moments take effect with `refresh_weights`.
        """
        self._optimizer.open_moments()
        return self._held

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        self._optimizer.set_lr(lr)

    def set_updates(self, updates: int) -> None:
        """Steps taken so far (skipped ones not counted); Adam's bias correction uses it."""
        self.updates = updates
        self._optimizer.set_step_count(updates)

    def step(
        self,
        objective: Loss,
        micro_batches: Sequence[MicroBatch],
        *,
        loss_limit: float = math.inf,
        grad_norm_limit: float = math.inf,
    ) -> StepResult:
        """One optimizer step over this rank's `micro_batches` of one global batch.

        One small reduction covers all reports and decisions. If one rank cannot take the step, or the mean loss or the
        gradient norm is above its limit, no rank takes it.
        """
        assert len(micro_batches) == self.accumulation, (len(micro_batches), self.accumulation)
        self._clear_gradients()
        losses: list[Tensor] = []
        parts: list[Mapping[str, Tensor]] = []
        for number, batch in enumerate(micro_batches, start=1):
            self._phases.enter("forward")
            loss, metrics = objective.loss(self._deepspeed, batch)
            self._phases.enter("backward")
            # averaged over all ranks, but summed over the ranks that share one example's tokens
            self._deepspeed.backward(loss * self._sequence_ranks)
            losses.append(loss.detach())
            parts.append(metrics)
            if number < self.accumulation:
                self._deepspeed.step()
        self._phases.enter("optimizer")
        names, sums = self._agree(losses, parts, sum(batch.digest for batch in micro_batches))
        fine = (sums[-1] == 0) & (sums[0] <= loss_limit)
        self._optimizer.arm(fine, self._reduced_norm, limit=grad_norm_limit)
        self._deepspeed.step()
        return self._result(names, sums, self._optimizer.disarm())

    def _reduced_norm(self) -> Tensor:
        """The gradients' global norm, equal on every rank, after the optimizer's step was called."""
        return torch.as_tensor(self._deepspeed.optimizer._global_grad_norm)

    def _result(self, names: Sequence[str], sums: Tensor, moved: Tensor | None) -> StepResult:
        """The result of the step. The only place that waits for the device, after the whole step is queued."""
        norm = self._reduced_norm().to(sums)
        moved = torch.zeros_like(norm) if moved is None else moved.to(sums)
        *means, a, b, c, d, broken, norm_, taken = torch.cat([sums, torch.stack([norm, moved])]).tolist()
        digest = sum(int(limb) << shift for limb, shift in zip((a, b, c, d), _SHIFTS)) % (1 << 64)
        self.updates += int(taken)
        reported = norm_ if not broken and math.isfinite(norm_) else math.nan
        metrics = dict(zip(names, means, strict=True))
        return StepResult(metrics.pop("loss"), reported, not taken, digest, metrics)

    def _clear_gradients(self) -> None:
        if isinstance(self._optimizer, ReplicatedAdamW):
            self._optimizer.expect_gradients()
            return
        # otherwise DeepSpeed updates a parameter unused in this step with its last gradient
        if self.zero_stage == 3:
            self._deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
        for master in self._flat_masters():
            if master.grad is not None:  # it stays allocated if the optimizer is offloaded
                master.grad.zero_()

    def _agree(self, losses: list[Tensor], parts: list[Mapping[str, Tensor]], digest: int) -> tuple[list[str], Tensor]:
        """One all-reduce: names, and float64 [names + 5]: their means, the sum of digests, count of non-finite ones."""
        names = ["loss", *sorted(parts[0])]
        rows = [[loss, *(part[name] for name in names[1:])] for loss, part in zip(losses, parts, strict=True)]
        sums = torch.stack([torch.stack([v.detach().double() for v in row]) for row in rows]).sum(0)
        digest = digest if distributed.rank() % self._sequence_ranks == 0 else 0  # once per group
        limbs = torch.tensor([digest >> shift & _LIMB - 1 for shift in _SHIFTS], dtype=torch.float64)
        broken = ~torch.isfinite(sums[:1])
        packed = torch.cat([sums, limbs.to(sums.device, non_blocking=True), broken])
        total = distributed.all_reduce_sum(packed)
        total[: len(names)] /= self.accumulation * distributed.world_size()
        return names, total

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Update the working weights and the optimizer state after other code has written masters and moments."""
        self._optimizer.close_moments()
        sharded = self._deepspeed.optimizer
        if isinstance(self._optimizer, ReplicatedAdamW):
            self._optimizer.publish()
            return
        if self.zero_stage < 3:
            sharded.update_lp_params()
            return
        for group in range(len(sharded.fp16_groups)):
            sharded._reassign_or_swap_out_partitioned_parameters(group)
        if small := sharded.persistent_parameters:
            small[0].partition(small)  # otherwise whole parameters, as after a step, are not gathered
            small[0].all_gather(small)

    def full_state_dict(self, values: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Trained parameters, whole, fp32 of the module's shapes, on rank 0's host memory (elsewhere empty).

        values: replace the masters, for example by the EMA's shadow: fp32 [numel] for each of `fragments()`
        """
        masters = [piece.master for piece in self._owned]
        return layout.assemble(self._owned, masters if values is None else values, shapes=self.shapes)

    def whole_tensors(self, values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Parameters of the module's shapes gathered from `values`, fp32 [numel] for each of `fragments()`.

        One parameter at a time, on every rank's device; collective.
        """
        return layout.whole_tensors(self._owned, values, shapes=self.shapes)

    def close(self) -> None:
        """Remove DeepSpeed's hooks; the engine can't be used any more."""
        self._deepspeed.destroy()
