"""Model FLOPs of the Wan DiT, by formula: the cost of a step, independent of recomputation and sharding.

A multiply and an add are two. Only matrix products are counted, as in torch's FlopCounterMode: norms,
rotary angles and softmax are below one per cent.
"""

from collections.abc import Mapping
from typing import Any

TRAINING_PASSES = 3  # forward, and twice as much backward; recomputation is not counted


def dit_tokens(config: Mapping[str, Any], latent: tuple[int, int, int]) -> int:
    """DiT tokens S of one example whose latent grid is (f, h, w)."""
    tokens = 1
    for size, patch in zip(latent, config["patch_size"], strict=True):
        tokens *= size // patch
    return tokens


def dit_forward_flop(config: Mapping[str, Any], latent: tuple[int, int, int], *, text_tokens: int) -> float:
    """FLOPs of one example's forward pass.

    config: constructor arguments of WanTransformer3DModel, with `in_channels` as built (32 with the video
    injected); latent: (f, h, w); text_tokens: the padded length of the DiT's text.
    """
    s, t = dit_tokens(config, latent), text_tokens
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = 1
    for size in config["patch_size"]:
        patch *= size
    embed = s * width * patch * (config["in_channels"] + config["out_channels"])  # and the output projection
    time = width * (config["freq_dim"] + width + 6 * width)
    text = t * width * (config["text_dim"] + width)
    self_attention = 4 * s * width**2 + 2 * s * s * width
    cross_attention = 2 * s * width**2 + 2 * t * width**2 + 2 * s * t * width
    feed_forward = 2 * s * width * config["ffn_dim"]
    layer = self_attention + cross_attention + feed_forward
    return 2.0 * (embed + time + text + config["num_layers"] * layer)


def dit_training_flop(
    config: Mapping[str, Any], latent: tuple[int, int, int], *, text_tokens: int, adapters: bool = False
) -> float:
    """FLOPs of one example's forward and backward pass; arguments as for `dit_forward_flop`.

    adapters: only LoRA trains, so no gradient of a frozen weight is computed; attention's own products have no
    weights and still cost three passes. The adapters' few per cent are not counted.
    """
    forward = dit_forward_flop(config, latent, text_tokens=text_tokens)
    if not adapters:
        return TRAINING_PASSES * forward
    s, width = dit_tokens(config, latent), config["num_attention_heads"] * config["attention_head_dim"]
    attention = 2.0 * config["num_layers"] * 2 * s * (s + text_tokens) * width
    return (TRAINING_PASSES - 1) * forward + attention
