"""A build's clips: the next batch goes to the encoder before the results of the last are taken, without a wait."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counters import Operators
from host_waits import Questions
from torch import Tensor

from flowmask.data_pipeline.build import encode
from flowmask.data_pipeline.build.build import Build, build
from flowmask.data_pipeline.build.encode import ClipEncoder
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.check.verify_masks import LATENT_TOLERANCE, distance
from flowmask.data_pipeline.clip.clips import Clip, Geometry
from flowmask.data_pipeline.clip.decode import DecodedClip
from flowmask.data_pipeline.plan.units import read_plan
from flowmask.models.weights.wan import WanFolder

CLIPS, TOGETHER = 5, 2


def clips() -> Iterator[DecodedClip]:
    for number in range(CLIPS):
        size, shown = (32, 16), np.random.default_rng(number)
        pixels = shown.integers(0, 256, (5, *reversed(size), 3), dtype=np.uint8)
        clip = Clip(
            number, 0, number, "v", tuple(range(5)), Geometry(size, None, None, size, flip=False), (("1",),), ()
        )
        yield DecodedClip(clip, pixels, {0: pixels[..., 0] > 99}, {0: []}, {})


def test_between_a_batch_and_the_next_nothing_of_the_device_is_asked(
    tiny_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU: it holds no numbers, so code that asks for one fails there."""
    seen: list[tuple[str, int]] = []

    class Noted:
        """Results of a batch; the test records when they are sent and when they are taken."""

        count = 0

        def __init__(self, *results: Tensor, dtype: torch.dtype) -> None:
            assert all(result.device.type == "meta" for result in results)
            self.results = [torch.zeros(result.shape, dtype=dtype) for result in results]
            self.number, Noted.count = Noted.count, Noted.count + 1
            self.kind = "videos" if len(results) == 2 else "masks"
            seen.append((f"{self.kind} sent", self.number))

        def get(self) -> list[Tensor]:
            seen.append((f"{self.kind} taken", self.number))
            return self.results

    monkeypatch.setattr(encode, "OnItsWay", Noted)
    vae: Any = WanFolder(tiny_wan).vae()
    encoder = ClipEncoder(vae.to("meta"), dtype=torch.bfloat16, pixel_norm="imagenet", batch_clips=TOGETHER)
    with Operators() as operators, Questions() as questions:
        assert len(list(encoder.encode(clips()))) == CLIPS
    assert operators.sent_bytes >= CLIPS * 5 * 16 * 32 * 4 and operators.waited_copies == 0
    assert not questions.seen["tensor on a device"]
    for kind in ("videos", "masks"):
        order = {name: place for place, name in enumerate(seen) if name[0].startswith(kind)}
        sent = [number for what, number in order if what.endswith("sent")]
        assert len(sent) == -(-CLIPS // TOGETHER)
        for number, after in pairwise(sent):
            assert order[f"{kind} sent", after] < order[f"{kind} taken", number], "the next is sent before it is taken"


def test_a_cache_encoded_in_bf16_is_right_within_the_limit_of_verify_and_near_one_in_fp32(
    make_config: Any, tiny_wan: Path, tmp_path: Path
) -> None:
    configs = {
        dtype: make_config(tmp_path / dtype, cache={"views": 1, "dtype": "float32", "encoder_dtype": dtype})
        for dtype in ("float32", "bfloat16")
    }
    build(configs["bfloat16"])
    found = verify(configs["bfloat16"].out, decode_masks=8, wan=tiny_wan)
    assert not found.problems and len(found.masks) == 8
    assert max(mask.error for mask in found.masks) < LATENT_TOLERANCE / 2
    plan = read_plan(configs["bfloat16"].out / "plan")
    assert plan is not None
    exact, rounded = (Build(config).clip_pass(plan).encode_unit(0) for config in configs.values())
    for one, other in zip(exact, rounded, strict=True):
        pairs = zip([one.video_mean, *one.mask_means.values()], [other.video_mean, *other.mask_means.values()])
        assert all(0 < distance(given, wanted) < LATENT_TOLERANCE for wanted, given in pairs)
