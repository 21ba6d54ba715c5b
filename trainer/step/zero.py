"""DeepSpeed, imported only here: makes its config, and its engine without its launcher and log output."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flowmask.models.errors import ConfigError
from flowmask.models.process import compiling_later, without
from flowmask.trainer.step.optimizer import ArmedAdamW
from flowmask.trainer.train_config import TrainConfig, accumulation_steps

_BUCKET_ELEMENTS = 50_000_000
_PERSISTENT_ELEMENTS = 100_000  # ZeRO 3 keeps parameters up to this size whole on every rank


def effective_stage(train: TrainConfig, world: int) -> int:
    """The ZeRO stage in effect: a single process has nothing to shard."""
    return 0 if world == 1 and not train.offload_optimizer else train.zero_stage


def config(train: TrainConfig, *, world: int) -> dict[str, Any]:
    """DeepSpeed's own config of a training of `world` processes."""
    stage = effective_stage(train, world)
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(train, world),
        "gradient_clipping": 0.0,  # the default is 1.0
    }
    if stage == 0:
        return found
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": _PERSISTENT_ELEMENTS,
    }
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return found | {
        "gradient_clipping": train.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": False},  # the engine decides
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def check(train: TrainConfig, *, world: int) -> str:
    """Check that DeepSpeed accepts its config of a training; returns its version. Raises ConfigError with its message.

    For a login node: variables set by the import would go with the job to nodes with GPUs.
    """
    environment = dict(os.environ)
    try:
        deepspeed = _deepspeed()
        from deepspeed.runtime.config import DeepSpeedConfig

        DeepSpeedConfig(config(train, world=world))
    except (AssertionError, ValueError, KeyError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"DeepSpeed {deepspeed.__version__} refuses the config of this training: {said}") from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return str(deepspeed.__version__)


def initialize(module: nn.Module, optimizer: ArmedAdamW, config: dict[str, Any]) -> Any:
    """`deepspeed.initialize` without its launcher and its compiled operators."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("LOCAL_SIZE", "1")  # otherwise ZeRO 3 runs `numactl` for every micro-batch
    deepspeed = _deepspeed()
    from deepspeed import ops
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # it prints at every construction
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    ops.__compatible_ops__ = {}  # otherwise gloo compiles an operator, which needs a compiler
    with compiling_later(), _unprinted():  # functions of an optimizer that is not used
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    if not config.get("zero_optimization"):
        engine.enable_backward_allreduce = False  # the replicated optimizer reduces its flat gradient itself
    return engine


@contextmanager
def _unprinted() -> Iterator[None]:
    """Inside the block, a parameter's text holds no values: ZeRO 3 formats all of them into a message that it drops.

    A rank has a thousand parameters, and on a GPU each value is a copy to the host.
    """
    parameter: Any = nn.Parameter
    real = parameter.__repr__
    parameter.__repr__ = object.__repr__
    try:
        yield
    finally:
        parameter.__repr__ = real


def _deepspeed() -> Any:
    """The package, without its log output."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when the package is imported
    with without("mlflow"):  # its unused autotuner would import mlflow in every rank, for a second each
        import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    return deepspeed
