"""The four ways of train_step.py to take one training step."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from train_sizes import TEXT_TOKENS, Size

import flowmask.trainer.run.train
from flowmask.data_pipeline.read.loader import Batch
from flowmask.models.dit import velocity
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.objectives.flow_matching import FlowMatching
from flowmask.trainer.run.loop import Ending
from flowmask.trainer.run.run_state import Run
from flowmask.trainer.run.start import save_memory_and_time


def inside_a_run(config: RunConfig, measure: Callable[[Run], object], *, build: Callable[[Any], nn.Module]) -> None:
    """A training run whose loop is `measure`; all other parts are those of `flowmask train`.

    build: the module of its objective
    """

    def loop(run: Run) -> Ending:
        measure(run)
        return Ending.STOPPED

    with ExitStack() as stack:
        stack.enter_context(patch.object(flowmask.trainer.run.train, "train", loop))
        stack.enter_context(patch.object(FlowMatching, "build", build))
        flowmask.trainer.run.train.run(config)


class Fixed:
    """A micro-batch for the DiT, made once."""

    def __init__(self, size: Size, *, batch: int):
        device = distributed.device()
        self.x_t, self.video_latent, self.target = torch.randn(3, batch, 16, *size.latent, device=device)
        self.timestep = torch.full((batch,), 437, device=device)
        self.text = torch.randn(batch, TEXT_TOKENS, size.dit["text_dim"], device=device).bfloat16()

    def loss(self, module: Any) -> Tensor:
        given = {"x_t": self.x_t, "video_latent": self.video_latent, "timestep": self.timestep}
        return (velocity(module, **given, text=self.text) - self.target).square().mean()


class Bare:
    """The run's own DeepSpeed engine and optimizer, on fixed tensors."""

    def __init__(self, run: Run, size: Size):
        self._engine, self._fixed = run.engine, Fixed(size, batch=run.config.train.micro_batch)
        device = distributed.device()
        self._fine, self._norm = (torch.ones((), dtype=torch.bool, device=device), torch.zeros((), device=device))

    def step(self) -> None:
        engine, deepspeed = self._engine, self._engine._deepspeed
        engine._clear_gradients()
        deepspeed.backward(self._fixed.loss(deepspeed))
        engine._optimizer.arm(self._fine, lambda: self._norm)
        deepspeed.step()
        engine._optimizer.disarm()


class BareTorch:
    """bf16 weights and gradients, fp32 masters, clipping and torch's fused AdamW."""

    def __init__(self, run: Run, size: Size):
        self._module = trained_as(run, size.build_dit()).to(distributed.device()).train()
        self._masters = [p.detach().clone() for p in self._module.parameters()]
        for parameter in self._module.parameters():
            parameter.data = parameter.data.bfloat16()
        self._weights = list(self._module.parameters())
        self._adam = torch.optim.AdamW(self._masters, lr=1e-5, fused=True)
        self._fixed = Fixed(size, batch=run.config.train.micro_batch)

    def step(self) -> None:
        self._fixed.loss(self._module).backward()
        for master, weight in zip(self._masters, self._weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._masters)


class Trainer:
    """One turn of the training loop; `encode` replaces the tensors of the cache."""

    def __init__(self, run: Run, encode: Callable[[], dict[str, Tensor]] | None = None):
        self._run, self._encode = run, encode

    def step(self) -> None:
        run = self._run
        micro_batches: list[Batch] = next(run.batches)
        if self._encode is not None:
            micro_batches = [replace(batch, **self._encode()) for batch in micro_batches]
        run.advance(run.take_step(micro_batches))
        run.agree()
        run.move_save_on()


def trained_as(run: Run, module: Any) -> Any:
    """Apply the run's recomputation and compilation to a module."""
    save_memory_and_time(run.config, run.objective, module)
    return module
