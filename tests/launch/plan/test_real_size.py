"""Wan2.1 1.3B at its real size on the CPU, without its weights: correct losses, memory as planned."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from published import write_published
from real_size import CLIP, DECODER_CLIP, ROOT, train_job

from flowmask.launch.plan.encoders import Encoders
from flowmask.launch.plan.model import architecture, trained_module
from flowmask.launch.plan.one_pass import micro_batch_pass
from flowmask.launch.plan.train import GpuSpeed, plan_training

NEEDED_GIB = {"lora_step": 12, "vae_passes": 14, "decoder_step": 16}  # host memory
pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published") / "Wan2.1-T2V-1.3B-Diffusers")


def run(name: str, wan: Path) -> Any:
    """The result of a function of real_size.py in a separate process; skips where the host has too little memory."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20
    if free < NEEDED_GIB[name]:
        pytest.skip(f"{name} needs {NEEDED_GIB[name]} GiB of host memory, {free:.1f} are available")
    command = [sys.executable, str(ROOT / "tests" / "support" / "real_size.py"), name, str(wan)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    freed = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # freed memory goes back to the system, and is not counted
    variables = {**os.environ, **freed, "PYTHONPATH": path}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, json.dumps(found))
    return found


def test_a_lora_step_has_the_loss_of_its_target_moves_every_adapter_and_takes_what_is_planned(wan: Path) -> None:
    found = run("lora_step", wan)
    job, shapes, step = train_job("train_mevis_lora", wan), architecture(wan), found["step"]
    assert found["target"] == pytest.approx(1 + math.exp(0.5) + 1, rel=0.02)  # mean, logvar, mask are N(0, 1)
    assert step["loss"] == pytest.approx(found["target"], rel=1e-3)
    assert step["grad_norm"] > 0 and not step["skipped"] and step["moved"] == found["trained"]
    assert found["names"] == len(list(trained_module(job, shapes).parameters()))
    planned = plan_training(job, speed=GpuSpeed(100.0, 0.5, "test"), clip=CLIP).chosen.device
    assert found["held"] == pytest.approx(planned.states, rel=0.01)
    cost = micro_batch_pass(job, shapes, CLIP, recompute="full", like_a_gpu=False)
    assert 0.8 * cost.peak_bytes < step["peak"] < 1.5 * cost.peak_bytes


def test_the_vae_encodes_and_decodes_a_clip_in_the_memory_that_is_planned(wan: Path) -> None:
    found, encoders = run("vae_passes", wan), Encoders(architecture(wan))
    assert found["encode"]["finite"] and found["decode"]["finite"]
    assert found["encode"]["shape"] == [1, 16, *CLIP.latent]
    assert found["decode"]["shape"] == [1, 1, CLIP.frames, CLIP.height, CLIP.width]
    for name, planned in (("encode", encoders.encode(CLIP, dtype="float32")), ("decode", encoders.decode(CLIP))):
        assert 0.8 * planned.peak_bytes < found[name]["peak"] < 1.5 * planned.peak_bytes


def test_a_mask_decoder_step_takes_the_memory_that_is_planned(wan: Path) -> None:
    step = run("decoder_step", wan)["step"]
    assert 0 < step["loss"] < 100 and step["grad_norm"] > 0 and not step["skipped"]
    cost = micro_batch_pass(train_job("train_mask_decoder", wan), architecture(wan), DECODER_CLIP, recompute="full")
    assert 0.8 * cost.peak_bytes < step["peak"] < 1.5 * cost.peak_bytes
