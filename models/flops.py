"""Model FLOPs of the Wan DiT, by formula: what a step costs, whatever recomputes or shards it.

A multiply and an add are two. Only matrix products are counted, as torch's FlopCounterMode does: norms,
rotary angles and softmax are below one per cent.
"""

from collections.abc import Mapping
from typing import Any

TRAINING_PASSES = 3  # forward, and twice as much backward; recomputation is no work of the model's


def dit_tokens(config: Mapping[str, Any], latent: tuple[int, int, int]) -> int:
    """DiT tokens S of one example whose latent grid is (f, h, w)."""
    tokens = 1
    for size, patch in zip(latent, config["patch_size"], strict=True):
        tokens *= size // patch
    return tokens


def dit_forward_flop(config: Mapping[str, Any], latent: tuple[int, int, int], *, text_tokens: int) -> float:
    """FLOPs of one example's forward pass.

    config: constructor arguments of WanTransformer3DModel, with `in_channels` as built (32 with the video
    injected); latent: (f, h, w); text_tokens: the padded length that the DiT sees.
    """
    s, t = dit_tokens(config, latent), text_tokens
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = 1
    for size in config["patch_size"]:
        patch *= size
    embed = s * width * patch * (config["in_channels"] + config["out_channels"])  # and the projection out
    time = width * (config["freq_dim"] + width + 6 * width)
    text = t * width * (config["text_dim"] + width)
    self_attention = 4 * s * width**2 + 2 * s * s * width
    cross_attention = 2 * s * width**2 + 2 * t * width**2 + 2 * s * t * width
    feed_forward = 2 * s * width * config["ffn_dim"]
    layer = self_attention + cross_attention + feed_forward
    return 2.0 * (embed + time + text + config["num_layers"] * layer)
