"""The functions that test_real_size.py runs, each in a separate process: Wan2.1 1.3B at 480x832 px on the CPU, and
its memory.

python real_size.py NAME WAN

Prints one line of JSON; WAN: a folder of published.py. CLIP: 5x480x832, or 17x480x832 with TRIALS above 1.
"""

import ctypes
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trials import TRIALS

from flowmask.launch.config import load_job
from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.one_pass import Shape
from flowmask.models.vae import LatentStats

ROOT = Path(__file__).parents[2]
# Where bf16 is no instruction of the CPU, it takes 3.5 times as long as fp32.
_SLOW_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())
PRECISION = "fp32" if _SLOW_BF16 and TRIALS == 1 else "bf16"
# The VAE takes a first frame, then four frames at a time, and keeps memory between: five frames use both.
CLIP = Shape(*map(int, os.environ.get("CLIP", "17x480x832" if TRIALS > 1 else "5x480x832").split("x")))
# The training of the VAE's decoder is the largest of the passes. It has to fit into a laptop.
DECODER_CLIP = Shape(5, 240, 416) if PRECISION == "fp32" else Shape(5, 480, 832)
UNIT = LatentStats(mean=(0.0,) * 16, std=(1.0,) * 16)


def train_job(name: str, wan: Path) -> TrainJob:
    """A bundled config in PRECISION with one example a step and full recomputation."""
    alone = ["micro_batch=1", "global_batch=1", "activation_checkpointing=full", f"precision={PRECISION}"]
    changes = [f"model.wan={wan}", "launch.processes_per_node=1", *(f"train.{change}" for change in alone)]
    return load_job(ROOT / "configs" / f"{name}.yaml", TrainJob, changes)


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds, and peak resident bytes, less the resident bytes at the start."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before would hide later growth of the same size
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    before, begin, found = _resident("VmRSS"), time.monotonic(), {}
    yield found
    found.update(seconds=time.monotonic() - begin, peak=_resident("VmHWM") - before)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def lora_step(wan: Path) -> dict[str, Any]:
    """A step from random weights. The last layer is near zero, so the loss is about the mean square of its target."""
    from flowmask.launch.plan.model import objective_of
    from flowmask.trainer.objectives import objective_named
    from flowmask.trainer.run.start import save_memory_and_time, starting_module
    from flowmask.trainer.step.ema import ShardedEma
    from flowmask.trainer.step.engine import Engine

    job = train_job("train_mevis_lora", wan)
    objective = objective_named(job.objective, model=job.model, stats=UNIT)
    generator = torch.Generator().manual_seed(0)
    with measured() as start:
        module, _ = starting_module(job, objective, settings=objective.settings(), resumed=False)
        names = len(dict(module.named_parameters()))
        save_memory_and_time(job, objective, module)
        engine = Engine(module, train=job.train)
        ema = ShardedEma(engine, decay=job.ema.decay)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.normal_(std=1e-3 if "proj_out" in name else 0.02, generator=generator)
        for piece in engine.held_fragments():
            piece.master.normal_(std=0.02, generator=generator)
    engine.refresh_weights()
    batch = objective_of(job).fake_batch(CLIP.latent, examples=1, text_dim=4096)
    for data in (batch.video_mean, batch.video_logvar, batch.mask_mean, batch.text):
        assert data is not None
        data.normal_(generator=generator)
    batch.draws, batch.keys = {}, [1]
    objective.prepare(batch)
    video, mask = objective._endpoints(batch)
    target = float((video - mask).square().mean())
    held = sum(t.nbytes for t in _tensors(module, engine, ema))
    before = [piece.master.clone() for piece in engine.fragments()]
    with measured() as step:
        found = engine.step(objective, [batch])
        ema.update()
    moved = sum(not torch.equal(old, piece.master) for old, piece in zip(before, engine.fragments(), strict=True))
    step |= {"loss": found.loss, "grad_norm": found.grad_norm, "skipped": found.skipped, "moved": moved}
    facts = {"names": names, "trained": len(before), "target": target, "held": held, "resident": _resident("VmRSS")}
    return {**facts, "start": start, "step": step}


def _tensors(module: nn.Module, engine: Any, ema: Any) -> list[Tensor]:
    """All tensors that are kept between two steps, each storage once."""
    optimizer = engine._optimizer
    every = [*module.parameters(), *module.buffers(), optimizer.master, optimizer.gradient, optimizer.working]
    every += [value for state in optimizer.state.values() for value in state.values()] + list(ema.shadow)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in every}
    return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]


def vae_passes(wan: Path) -> dict[str, Any]:
    """Encoding a clip and decoding its latent with random weights, fp32."""
    from flowmask.models.mask_decoder import MaskDecoder
    from flowmask.models.vae import encode_moments
    from flowmask.models.weights.wan import WanFolder

    vae: Any = WanFolder(wan).vae()
    draw(vae)
    with measured() as encoding, torch.no_grad():
        clip = torch.rand(1, 3, CLIP.frames, CLIP.height, CLIP.width) * 2 - 1
        mean, logvar = encode_moments(vae, clip)
    encoding |= {"finite": bool(torch.isfinite(mean).all() & torch.isfinite(logvar).all()), "shape": list(mean.shape)}
    decoder = MaskDecoder.from_vae(vae).requires_grad_(False)
    del vae, clip, logvar
    with measured() as decoding, torch.no_grad():
        logits = decoder(mean)
    decoding |= {"finite": bool(torch.isfinite(logits).all()), "shape": list(logits.shape)}
    return {"encode": encoding, "decode": decoding}


def decoder_step(wan: Path) -> dict[str, Any]:
    """A training step of the VAE's decoder as a mask decoder, of a clip of five frames."""
    from flowmask.launch.plan.model import objective_of
    from flowmask.trainer.step.engine import Engine

    job = train_job("train_mask_decoder", wan)
    objective = objective_of(job)
    module = objective.build()
    draw(module)
    objective.recompute(module, "full")
    engine = Engine(module, train=job.train)
    batch = objective.fake_batch(DECODER_CLIP.latent, examples=1, text_dim=4096)
    assert batch.mask_mean is not None and batch.mask_pixels is not None
    batch.mask_mean.normal_()
    batch.mask_pixels[..., : DECODER_CLIP.height // 2, : DECODER_CLIP.width // 2] = True
    with measured() as step:
        found = engine.step(objective, [batch])
    return {"step": {"loss": found.loss, "grad_norm": found.grad_norm, "skipped": found.skipped, **step}}


def draw(module: nn.Module) -> None:
    """Weights that keep numbers near 1; norms keep their initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.ndim > 1 and tensor[0].numel() > 1:
                tensor.normal_(std=1 / math.sqrt(tensor[0].numel()), generator=generator)
            else:
                tensor.fill_(1.0)


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    kind.__name__: kind for kind in (lora_step, vae_passes, decoder_step)
}

if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]](Path(sys.argv[2]))))
