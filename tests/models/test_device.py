"""Layers made from a seed do not disturb the random numbers of the process."""

import pytest
import torch
from torch import Tensor, nn

from flowmask.models.config import LightDecoderConfig
from flowmask.models.decoders.light import LightMaskDecoder
from flowmask.models.device import seeded


def test_what_is_drawn_inside_follows_from_the_seed_and_no_stream_of_the_process_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(seed: int) -> Tensor:
        with seeded(seed):
            return nn.Linear(8, 8).weight.detach()

    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the streams of GPUs were seeded"))
    before = torch.random.get_rng_state()
    one, other, again = made(1), made(2), made(1)
    LightMaskDecoder.fresh(LightDecoderConfig(width=4))
    with pytest.raises(ZeroDivisionError), seeded(3):
        _ = 1 / 0
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
