"""Our config alone determines DeepSpeed's, and DeepSpeed's own reader accepts it."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import Training

from flowmask.models.errors import ConfigError
from flowmask.trainer.step import zero
from flowmask.trainer.train_config import TrainConfig

ROOT = Path(__file__).parents[3]


def training(**keys: Any) -> TrainConfig:
    return TrainConfig.model_validate({"steps": 10, "global_batch": 16, "micro_batch": 2, **keys})


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_takes_every_training_that_we_take(stage: int) -> None:
    ways = itertools.product((1, 2, 8), ("bf16", "fp32"), (False, True) if stage else (False,))
    for world, precision, offload in ways:
        train = training(zero_stage=stage, precision=precision, offload_optimizer=offload)
        assert zero.check(train, world=world)


def test_a_rank_that_takes_a_step_imports_neither_mlflow_nor_transformers_nor_torchs_compiler() -> None:
    unused = ["mlflow", "transformers", "bitsandbytes", "torch._inductor.compile_fx"]
    words = f"""
import sys
from flowmask.launch.jobs import import_diffusers
import_diffusers()
import flowmask.trainer.run.train
from scenarios import Training
Training(stage=1, precision="bf16", change={{"offload_optimizer": True}}).run(range(1))  # DeepSpeed's ZeRO in one rank
print([name for name in {unused} if name in sys.modules])"""
    found_in = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    command = [sys.executable, "-c", words]
    done = subprocess.run(command, env=os.environ | found_in, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_start_makes_no_text_of_the_values_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[torch.Size] = []
    for stage in (1, 2, 3):
        with monkeypatch.context() as patched:
            patched.setattr(torch._tensor_str, "_str", lambda tensor, **_: written.append(tensor.shape) or "")
            training = Training(stage=stage, precision="bf16", change={"offload_optimizer": True})
        training.engine.close()
    assert written == []
    assert "0.5" in repr(torch.nn.Parameter(torch.tensor([0.5])))


def test_asking_leaves_nothing_in_the_environment_that_a_job_would_take_along() -> None:
    before = dict(os.environ)
    zero.check(training(), world=2)
    assert dict(os.environ) == before


def test_what_deepspeed_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 7}}
    monkeypatch.setattr(zero, "config", lambda *_, **__: wrong)
    with pytest.raises(ConfigError, match=r"DeepSpeed .*stage") as refused:
        zero.check(training(), world=2)
    assert "\n" not in str(refused.value)
