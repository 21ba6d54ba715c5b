"""The module of a run with its initial weights, and which of them are frozen.

A checkpoint holds only trained weights, and the hash of the frozen weights that they need (a LoRA's base); other
frozen weights are refused.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flowmask.models.dit import compile_blocks, require_attention, use_attention
from flowmask.models.errors import CheckpointError
from flowmask.models.lora import add_lora, named_parameters
from flowmask.models.strict import refuse_not_finite
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.objectives.base import Objective
from flowmask.trainer.predict.weights import content_sha256, start_from


def starting_module(
    config: RunConfig, objective: Objective, *, settings: Mapping[str, Any], resumed: bool
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The module, float32 on the CPU, and the record of `model.init`.

    settings: conventions that `model.init` must share. A resume reads `model.init` only if it is the base of
    adapters; otherwise the checkpoint holds all trained weights.
    """
    module = _built(config, objective).requires_grad_(True)
    taken = None
    if config.model.init is not None and (config.lora is not None or not resumed):
        source = config.model.init
        taken = start_from(source, module, ema=config.model.init_ema, settings=settings, wan=config.model.wan)
    if config.lora is not None:
        add_lora(module, config.lora, seed=config.train.seed)
    refuse_not_finite(named_parameters(module), where=f"{config.objective.kind}'s module", fix="get other weights")
    return module, taken


def _built(config: RunConfig, objective: Objective) -> nn.Module:
    """The module with the kernels of `train.attention`.

    Raises ConfigError, before weights are read, if they can't run.
    """
    attention, key = config.train.attention, "train.attention"
    if attention == "native":
        return objective.build()
    require_attention(attention, key=key, device=distributed.device())
    module = objective.build()
    use_attention(module, attention, key=key)
    return module


def save_memory_and_time(config: RunConfig, objective: Objective, module: nn.Module) -> None:
    """Apply recomputation and compilation as configured."""
    recompute = config.train.activation_checkpointing
    if config.train.compile:
        compile_blocks(module, recompute=recompute)
    elif recompute != "none":
        objective.recompute(module, recompute)


def frozen_record(
    config: RunConfig, module: nn.Module, *, known: Mapping[str, Any] | None, resumed: bool
) -> dict[str, Any] | None:
    """Number and hash of the frozen parameters, in fp32.

    Raises CheckpointError if a resumed run recorded others (`known`).
    """
    frozen = {name: p for name, p in named_parameters(module) if not p.requires_grad}
    found = {"parameters": len(frozen), "sha256": content_sha256(frozen)} if frozen else None
    if resumed and known != found:
        base = f"model.init {config.model.init}" if config.model.init else f"model.wan {config.model.wan}"
        raise CheckpointError(
            f"{config.out} was trained on other frozen weights ({_short(known)}) than {base} has "
            f"({_short(found)}); restore the old ones, or start a new run with another out"
        )
    return found


def _short(record: Mapping[str, Any] | None) -> str:
    return f"{record['parameters']} tensors, sha256 {record['sha256'][:12]}" if record else "none"


def share_cores() -> None:
    """Split the machine's cores between its processes, unless OMP_NUM_THREADS is set."""
    if distributed.device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
