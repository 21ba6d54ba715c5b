"""The cost of the two mask decoders at the published VAE's size, with random weights: FLOPs, memory and CPU seconds.

    python benchmarks/mask_decoders.py [--json] [--clip FRAMESxHEIGHTxWIDTH] [--rounds N]

FLOPs and the peak of a pass are those of 17x480x832 in fp32, on fake tensors. CPU seconds are for decoding a smaller
clip on one core, medians over alternating rounds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from flowmask.launch.plan.encoders import Encoders
from flowmask.launch.plan.model import architecture
from flowmask.launch.plan.one_pass import Shape
from flowmask.launch.plan.plan import clip_of
from flowmask.models.config import LightDecoderConfig
from flowmask.models.decoders.light import LightMaskDecoder
from flowmask.models.mask_decoder import MaskDecoder

PUBLISHED = Shape(17, 480, 832)


def cpu_s(decoder: nn.Module, latent: torch.Tensor) -> float:
    started = time.process_time()
    with torch.no_grad():
        decoder(latent)
    return time.process_time() - started


def measure(shape: Shape, *, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    encoders, light = Encoders(architecture(Path("none"))), LightDecoderConfig()
    own, lean = encoders.decode(PUBLISHED), encoders.decode(PUBLISHED, light=light)
    decoders = MaskDecoder.from_vae(AutoencoderKLWan()).eval(), LightMaskDecoder.fresh(light).eval()
    latent = torch.randn(1, 16, *shape.latent)
    times = [[cpu_s(decoder, latent) for decoder in decoders] for _ in range(rounds)]
    vae_s, light_s = (statistics.median(column) for column in zip(*times))
    return {
        "vae_tflop": round(own.flop / 1e12, 2),
        "light_tflop": round(lean.flop / 1e12, 4),
        "share": lean.flop / own.flop,
        "vae_peak_gb": round(own.peak_bytes / 1e9, 2),
        "light_peak_gb": round(lean.peak_bytes / 1e9, 2),
        "clip": str(shape),
        "vae_cpu_s": round(vae_s, 3),
        "light_cpu_s": round(light_s, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--clip", default="17x128x128")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shape = clip_of(options.clip)
    assert shape is not None
    figures = measure(shape, rounds=options.rounds)
    print(json.dumps(figures) if options.json else figures)


if __name__ == "__main__":
    main()
