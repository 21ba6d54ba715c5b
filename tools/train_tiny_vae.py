"""Make the tiny Wan VAE in models/tiny: `python -m tools.train_tiny_vae --out DIR --minutes 12`.

The encoder has a closed form (tools/tiny_vae_encoder.py): the principal components of synthetic clips and of their
masks as grey videos, at Wan's scale. One CPU thread trains the decoder to invert it, on synthetic clips, masks and
noise textures. DIR then holds config.json, the weights in bfloat16 and measured.json.
Recipe of the shipped files: `--minutes 9`, then `--start` from the result with `--minutes 30 --lr 2e-3`, stopped
after 20 minutes.
"""

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor, nn

from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.sources.synthetic_scene import BLOCK, draw_block
from tools.tiny_vae_encoder import POSTERIOR_STD, LinearEncoder, fit, write

ARCHITECTURE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 6],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
RAW_STD = 1.7  # standard deviation of every latent channel over videos and masks together
GEOMETRIES = ((9, 64, 96), (17, 48, 48), (5, 64, 96), (9, 48, 64))  # frames, height, width in addition to 5 x 64 x 64
# Every `vae` below is an AutoencoderKLWan; diffusers has no types for it.
log = logging.getLogger("train_tiny_vae")


def textures(rng: np.random.Generator, count: int, frames: int, height: int, width: int) -> NDArray[np.float32]:
    """Natural-looking clips: panning noise with a 1/f-like spectrum, signed float32 [N 3 F H W]."""
    margin = 16
    canvas = np.zeros((count, 3, height + margin, width + margin), np.float32)
    tall, wide = canvas.shape[2:]
    for cell, weight in ((48, 1.0), (24, 0.7), (12, 0.5), (6, 0.3), (3, 0.2), (1, 0.06)):
        coarse = rng.normal(0, weight, (count, 3, tall // cell + 2, wide // cell + 2)).astype(np.float32)
        grey = rng.uniform(0.3, 1.0, (count, 1, 1, 1)).astype(np.float32)
        coarse = grey * coarse.mean(1, keepdims=True) * 1.7 + (1 - grey) * coarse
        smooth = F.interpolate(torch.from_numpy(coarse), (tall, wide), mode="bilinear", align_corners=False)
        canvas += smooth.numpy()
    canvas = np.tanh(canvas * rng.uniform(0.3, 0.9, (count, 1, 1, 1)) + rng.normal(0, 0.4, (count, 3, 1, 1)))
    start, stop = rng.integers(0, margin + 1, (2, count, 2))
    clips = np.empty((count, 3, frames, height, width), np.float32)
    for n in range(count):
        stop[n] = np.clip(stop[n], start[n] - frames, start[n] + frames)
        for f in range(frames):
            y, x = np.rint(start[n] + (stop[n] - start[n]) * f / max(frames - 1, 1)).astype(int)
            clips[n, :, f] = canvas[n, :, y : y + height, x : x + width]
    return clips


def blobs(rng: np.random.Generator, count: int, frames: int, height: int, width: int) -> NDArray[np.float32]:
    """Masks of irregular, panning regions as grey videos: -1 or 1, float32 [N 3 F H W]."""
    field = textures(rng, count, frames, height, width)[:, :1]
    level = np.quantile(field, rng.uniform(0.4, 0.95))
    return np.repeat(np.where(field > level, 1.0, -1.0).astype(np.float32), 3, axis=1)


def scenes(seed: int, block: int, *, frames: int = 5, size: int = 64) -> tuple[NDArray[np.float32], ...]:
    """One block of synthetic clips and one mask for each, both signed float32 [N 3 F H W]."""
    drawn = draw_block(seed, block, frames=frames, size=size)
    videos = drawn.frames.transpose(0, 4, 1, 2, 3).astype(np.float32) / 127.5 - 1
    rng = np.random.default_rng(mix64(seed, block, 1))
    named = rng.random(drawn.masks.shape[:2]) < 0.45
    masks = np.any(drawn.masks & np.asarray(named)[:, :, None, None, None], axis=1)
    return videos, np.repeat(np.expand_dims(masks, 1), 3, axis=1).astype(np.float32) * 2 - 1


def batches(seed: int) -> Iterator[Tensor]:
    """Endless batches: 2 synthetic videos, 4 masks, 1 blob and 1 texture; every 6th has another size and length."""
    rng = np.random.default_rng(mix64(seed, 2))
    step = 0
    for block in iter(range(1 << 40)):
        videos, masks = scenes(seed, block)
        for first in range(0, BLOCK, 4):
            step += 1
            if step % 6 == 0:
                frames, height, width = GEOMETRIES[step // 6 % len(GEOMETRIES)]
                count = max(1, 4 * 5 * 64 * 64 // (frames * height * width))
                parts = [make(rng, count, frames, height, width) for make in (blobs, textures)]
            else:
                other = (first + 40 + np.arange(6)) % BLOCK
                parts = [videos[first : first + 7], masks[other], blobs(rng, 1, 5, 64, 64), textures(rng, 2, 5, 64, 64)]
            yield torch.from_numpy(np.concatenate(parts)).contiguous(memory_format=torch.channels_last_3d)


def decode(vae: Any, raw: Tensor) -> Tensor:
    """Latent [B 16 f h w] raw -> pixels [B 3 F H W], without the clamp of `vae.decode`, which stops gradients."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(raw)
    frames = []
    for i in range(raw.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(hidden[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return torch.cat(frames, 2)


def new_vae(linear: LinearEncoder, seed: int) -> Any:
    """A VAE whose encoder is `linear`. The decoder's residual branches start at zero: training is then faster."""
    torch.manual_seed(seed)
    vae: Any = AutoencoderKLWan(**ARCHITECTURE)
    write(linear, vae)
    for name, module in vae.decoder.named_modules():
        if name.endswith("conv2") and isinstance(module, nn.Conv3d):
            nn.init.zeros_(module.weight)
    return channels_last(vae)


def channels_last(vae: Any) -> Any:
    """The same VAE with weights laid out for the CPU's fast convolutions; the numbers do not change."""
    formats = {nn.Conv3d: torch.channels_last_3d, nn.Conv2d: torch.channels_last}
    for module in vae.modules():
        for kind, memory_format in formats.items():
            if isinstance(module, kind):
                module.weight.data = module.weight.data.contiguous(memory_format=memory_format)
    return vae


def decoder_weights(vae: Any) -> list[Tensor]:
    """The trained parameters."""
    return [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]


def train(vae: Any, linear: LinearEncoder, *, out: Path, minutes: float, seed: int, lr: float) -> None:
    """Train the decoder in place for `minutes`; save averaged weights during the training.

    Convolutions run on a bfloat16 copy; AdamW and the average keep fp32.
    """
    working = copy.deepcopy(vae).to(torch.bfloat16)
    master, fast = decoder_weights(vae), decoder_weights(working)
    optimizer = torch.optim.AdamW(master, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, foreach=True)
    averaged = copy.deepcopy(vae)
    average = [p.detach() for p in decoder_weights(averaged)]
    begin, next_save, recent = time.monotonic(), 2.0, 0.0
    for step, clips in enumerate(batches(seed), 1):
        spent = (time.monotonic() - begin) / 60
        if spent >= minutes:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 30) * (0.02 + 0.49 * (1 + math.cos(math.pi * spent / minutes)))
        with torch.no_grad():
            torch._foreach_copy_(fast, master)
            latent = linear(clips)
            latent += POSTERIOR_STD * linear.scale.view(1, -1, 1, 1, 1) / RAW_STD * torch.randn_like(latent)
        error = decode(working, latent.to(torch.bfloat16)).float() - clips
        square = (error**2).mean()
        (square + 0.1 * error.abs().mean()).backward()
        for target, source in zip(master, fast, strict=True):
            assert source.grad is not None
            target.grad, source.grad = source.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, master, max(1 / step, 0.02))
        recent += (square.item() - recent) * max(1 / step, 0.02)
        if step % 25 == 0:
            log.info("step %d  %.1f min  mean square error %.4f", step, spent, recent)
        if spent >= next_save:
            save(averaged, out)
            next_save += 3
    with torch.no_grad():
        torch._foreach_copy_(master, average)


@torch.no_grad()
def save(trained: Any, out: Path) -> None:
    """Round to bfloat16, measure on clips that training never saw, and write the folder."""
    vae = channels_last(copy.deepcopy(trained).to(torch.bfloat16).float())
    videos, masks = (torch.from_numpy(clips) for clips in scenes(mix64(0xE7A1), 0))
    latent, mask_latent = (vae._encode(clips)[:, :16] for clips in (videos, masks))
    of_videos, of_masks = (z.transpose(0, 1).flatten(1) for z in (latent, mask_latent))
    vae.register_to_config(latents_mean=of_videos.mean(1).tolist(), latents_std=of_videos.std(1).tolist())
    decoded, truth = decode(vae, mask_latent)[:, 0] > 0, masks[:, 0] > 0
    natural = torch.from_numpy(textures(np.random.default_rng(5), 8, 9, 64, 96))
    measured = {
        "video_psnr_db": _psnr(decode(vae, latent), videos),
        "texture_psnr_db": _psnr(decode(vae, vae._encode(natural)[:, :16]), natural),
        "mask_iou": float((decoded & truth).sum() / (decoded | truth).sum()),
        "video_raw_std": of_videos.std(1).tolist(),
        "mask_raw_std": of_masks.std(1).tolist(),
    }
    vae.to(torch.bfloat16).save_pretrained(out)
    (out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    log.info("saved %s: %s", out, {k: v for k, v in measured.items() if isinstance(v, float)})


def _psnr(decoded: Tensor, clips: Tensor) -> float:
    return 10 * math.log10(4 / float(((decoded.clamp(-1, 1) - clips) ** 2).mean()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the tiny Wan VAE that FlowMask ships.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=30, help="training time on one thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--start", type=Path, help="go on from the decoder of this folder, of the same --seed")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(1)
    linear = fit(torch.from_numpy(np.concatenate(scenes(mix64(options.seed, 3), 0))), raw_std=RAW_STD)
    vae = new_vae(linear, options.seed)
    if options.start is not None:
        earlier: Any = AutoencoderKLWan.from_pretrained(options.start)
        vae.decoder.load_state_dict(earlier.decoder.state_dict())
        vae.post_quant_conv.load_state_dict(earlier.post_quant_conv.state_dict())
    train(
        vae,
        linear,
        out=options.out,
        minutes=options.minutes,
        seed=mix64(options.seed, 4, options.start is not None),
        lr=options.lr,
    )
    save(vae, options.out)


if __name__ == "__main__":
    main()
