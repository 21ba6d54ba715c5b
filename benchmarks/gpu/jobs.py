"""Jobs on this machine: a cache build's encoder, an evaluation's models, a training's ranks up to their first steps."""

import json
import os
import time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from flowmask.data_pipeline.build.encode import ClipEncoder
from flowmask.data_pipeline.clip.clips import Clip, Geometry
from flowmask.data_pipeline.clip.decode import DecodedClip
from flowmask.data_pipeline.clip.vae_clip import VaeClip
from flowmask.data_pipeline.config import FrameBox
from flowmask.launch.local.processes import run_local
from flowmask.models.config import SamplerConfig
from flowmask.models.device import use_tf32
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.segment import Segmenter, SegmentSettings
from flowmask.models.text import TextEncoder
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.inference import LoadedSegmenter, masks_of
from flowmask.trainer.state.run_folder import METRICS
from gpu.forwards import DTYPES
from gpu.lab import Lab
from gpu.steps import training

_STEPS = 2


def cache(precision: str, at_once: int, lab: Lab) -> dict[str, Any]:
    """Clips of one mask through a build's own encoder, from pixels in host memory to moments in host memory."""
    use_tf32(precision == "tf32")
    vae = lab.drawn(lab.shapes.vae(), DTYPES[precision]).eval().requires_grad_(False)
    encoder = ClipEncoder(vae, dtype=torch.bfloat16, pixel_norm="half", batch_clips=at_once)
    clips = [_clip(lab, number) for number in range(lab.scale.cached_clips)]
    seconds = lab.seconds(lambda: list(encoder.encode(clips)), warm=1)
    flop = 2 * len(clips) * lab.encoders.encode(lab.clip, dtype="bfloat16").flop
    return {"clips_per_s": len(clips) / seconds, **lab.shares(flop, seconds), **lab.memory()}


def _clip(lab: Lab, number: int) -> DecodedClip:
    frames, height, width = lab.scale.clip
    rng, size = np.random.default_rng(number), (width, height)
    mask = np.zeros(lab.scale.clip, bool)
    mask[:, height // 4 : height // 2, width // 4 : width // 2] = True
    pixels = rng.integers(0, 256, (*lab.scale.clip, 3), dtype=np.uint8)
    shape = Geometry(size, None, None, size, flip=False)
    clip = Clip(number, 0, number, f"video {number}", tuple(range(frames)), shape, masks=(("1",),), sentences=())
    return DecodedClip(clip, pixels, {0: mask}, {0: []}, {})


def evaluate(sentences: int, decoder: str, lab: Lab) -> dict[str, Any]:
    """From pixels and sentences of a video to its masks, by an evaluation's models; no reading, scoring or writing."""
    use_tf32(None)
    loaded = _segmenter(lab, decoder)
    frames, height, width = lab.scale.clip
    rgb8 = np.random.default_rng(0).integers(0, 256, (*lab.scale.clip, 3), dtype=np.uint8)
    clip = VaeClip(rgb8, frames, (width, height), (width, height), "half")
    said = [f"the large shape number {i} on the left" for i in range(sentences)]

    def work() -> None:
        for logits in loaded.logits(loaded.encode(clip), said):
            for _ in masks_of(logits, clip):
                pass

    seconds = lab.seconds(work, warm=1)
    return {"seconds": seconds, "s_per_sentence": seconds / sentences, **lab.memory()}


def _segmenter(lab: Lab, decoder: str) -> LoadedSegmenter:
    """Random weights in an evaluation's precisions: DiT and text in bf16, video in fp32, the decoder as requested."""
    vae: Any = lab.drawn(lab.shapes.vae()).requires_grad_(False)
    text = lab.drawn(lab.shapes.text_encoder(), torch.bfloat16)
    whole = Segmenter(
        lab.drawn(lab.shapes.dit(video_injection=True), torch.bfloat16).requires_grad_(False),
        vae=vae,
        text_encoder=TextEncoder(WanFolder(lab.tiny_wan).text_encoder().tokenizer, text),
        mask_decoder=MaskDecoder.from_vae(vae).to(DTYPES[decoder]).requires_grad_(False),
        settings=SegmentSettings(SamplerConfig()),
    )
    return LoadedSegmenter(whole, pixel_norm="half", box=FrameBox(), weights={}, wan_files="")


def start(ranks: int, lab: Lab) -> dict[str, Any]:
    """A training of the tiny Wan from its launcher to its first steps; with more than one rank on the CPU."""
    options = {"steps": _STEPS, "global_batch": ranks, "log_every_steps": 1}
    job = training(lab, wan=lab.tiny_wan, cache=lab.tiny_cache, ranks=ranks, train=options)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if ranks > 1 or not lab.gpu else {}
    began = time.time()
    with patch.dict(os.environ, hidden):
        run_local("train", job.model_dump(mode="json"), processes=ranks)
    rows = [json.loads(line) for line in (job.out / METRICS).read_text().splitlines()]
    return {"first_step_s": rows[0]["time"] - began, "to_the_end_s": time.time() - began}
