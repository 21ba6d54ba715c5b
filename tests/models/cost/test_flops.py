"""The FLOP formula gives torch's counts, and the measured count at the real size."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowmask.models.config import LoraConfig
from flowmask.models.cost.flops import dit_forward_flop, dit_tokens, dit_training_flop
from flowmask.models.dit import build_dit, velocity
from flowmask.models.lora import add_lora
from flowmask.models.weights.tiny_wan import TRANSFORMER

WAN_1_3B = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
    "text_dim": 4096,
    "freq_dim": 256,
    "in_channels": 32,
    "out_channels": 16,
}


@pytest.mark.parametrize(
    ("channels", "batch", "latent", "text_tokens"),
    [(32, 1, (2, 8, 12), 7), (16, 3, (1, 4, 4), 64), (32, 2, (3, 6, 10), 16)],
)
def test_the_formula_is_what_the_counter_counts(
    channels: int, batch: int, latent: tuple[int, int, int], text_tokens: int
) -> None:
    dit: Any = build_dit(TRANSFORMER, in_channels=channels).to_empty(device="cpu")
    shape = (batch, 16, *latent)
    text = torch.zeros(batch, text_tokens, dit.config.text_dim)
    by_products = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with torch.no_grad(), by_products, FlopCounterMode(display=False) as counter:
        velocity(
            dit, x_t=torch.zeros(shape), video_latent=torch.zeros(shape), timestep=torch.full((batch,), 1000), text=text
        )
    formula = batch * dit_forward_flop(dit.config, latent, text_tokens=text_tokens)
    assert counter.get_total_flops() == formula


def test_wan_1_3b_costs_what_was_measured() -> None:
    latent = (5, 60, 104)
    assert dit_tokens(WAN_1_3B, latent) == 7800
    assert dit_forward_flop(WAN_1_3B, latent, text_tokens=256) / 1e12 == pytest.approx(31.2, abs=0.05)


@pytest.mark.parametrize("adapters", [False, True])
def test_frozen_weights_cost_no_gradients_of_their_own(adapters: bool) -> None:
    latent, text_tokens = (3, 24, 28), 16
    dit: Any = build_dit(TRANSFORMER, in_channels=32).to_empty(device="cpu")
    if adapters:
        add_lora(dit, LoraConfig(rank=1, also_train=("patch_embedding",)), seed=0)
    shape = (1, 16, *latent)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocity(
            dit,
            x_t=torch.zeros(shape),
            video_latent=torch.zeros(shape),
            timestep=torch.full((1,), 1000),
            text=torch.zeros(1, text_tokens, dit.config.text_dim),
        ).sum().backward()
    formula = dit_training_flop(dit.config, latent, text_tokens=text_tokens, adapters=adapters)
    assert counter.get_total_flops() == pytest.approx(formula, rel=0.05)
    whole = dit_training_flop(dit.config, latent, text_tokens=text_tokens)
    assert adapters == (formula < 0.95 * whole)
