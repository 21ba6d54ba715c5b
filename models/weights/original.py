"""Wan2.1's original files: the name of each part, and the tables of its tensors' names.

A table maps diffusers' name (transformers' for the text encoder) to the original one. So a model gives the names that
a file must have, and the strict check reports names in the file. Tensors are equal on both sides.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flowmask.models.dit import PATCH_KEY, build_dit

Shapes = Mapping[str, tuple[int, ...]]
HEAD_WIDTH = 128  # of every published DiT; a file alone does not contain it
_DIT = {
    r"condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"scale_shift_table": "head.modulation",
    r"proj_out": "head.head",
    r"(blocks\.\d+)\.scale_shift_table": r"\1.modulation",
    r"(blocks\.\d+)\.norm2": r"\1.norm3",  # before cross-attention; diffusers numbers it by place, Wan by age
    r"(blocks\.\d+)\.ffn\.net\.0\.proj": r"\1.ffn.0",
    r"(blocks\.\d+)\.ffn\.net\.2": r"\1.ffn.2",
    **{
        rf"(blocks\.\d+)\.{ours}\.{end}": rf"\1.{theirs}.{said}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for end, said in ((r"to_out\.0", "o"), (r"to_([qkv])", r"\2"), (r"(norm_[qk])", r"\2"))
    },
}
_VAE = {
    r"quant_conv": "conv1",
    r"post_quant_conv": "conv2",
    r"(encoder|decoder)\.conv_in": r"\1.conv1",
    r"(encoder|decoder)\.norm_out": r"\1.head.0",
    r"(encoder|decoder)\.conv_out": r"\1.head.2",
    r"(encoder|decoder)\.mid_block\.attentions\.0": r"\1.middle.1",
    r"(encoder|decoder)\.mid_block\.resnets\.0": r"\1.middle.0",
    r"(encoder|decoder)\.mid_block\.resnets\.1": r"\1.middle.2",
    r"encoder\.down_blocks\.(\d+)": r"encoder.downsamples.\1",
    **{  # three residual blocks and the upsampling, in one row over all four
        rf"decoder\.up_blocks\.{block}\.{ours}": f"decoder.upsamples.{4 * block + place}"
        for block in range(4)
        for place, ours in enumerate((r"resnets\.0", r"resnets\.1", r"resnets\.2", r"upsamplers\.0"))
    },
}
_VAE_LAYERS = {  # after the name of a residual block
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_TEXT = {
    r"shared": "token_embedding",
    r"encoder\.final_layer_norm": "norm",
    **{
        rf"encoder\.block\.(\d+)\.layer\.{ours}": rf"blocks.\1.{theirs}"
        for ours, theirs in (
            (r"0\.layer_norm", "norm1"),
            (r"0\.SelfAttention\.([qkvo])", r"attn.\2"),
            (r"0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
            (r"1\.layer_norm", "norm2"),
            (r"1\.DenseReluDense\.wi_0", "ffn.gate.0"),
            (r"1\.DenseReluDense\.wi_1", "ffn.fc1"),
            (r"1\.DenseReluDense\.wo", "ffn.fc2"),
        )
    },
}


@dataclass(frozen=True)
class OriginalPart:
    """One part of Wan2.1.

    folder, stem: its place in the diffusers layout
    file:  its name in the original folder; for the DiT the stem of safetensors files
    mark:  a tensor that only this part has
    table: of names, see above; patterns match whole names up to a dot. layers: of the name's next part
    model: (original shapes, content of config.json) -> the model on the meta device; KeyError, ValueError, ...
    """

    folder: str
    stem: str
    file: str
    mark: str
    table: Mapping[str, str]
    model: Callable[[Shapes, Mapping[str, Any]], Any]
    layers: Mapping[str, str] = field(default_factory=dict)

    def names(self, model: Any) -> dict[str, str]:
        """The model's tensors, by their original names."""
        tied = getattr(model, "_tied_weights_keys", None) or {}
        ours = [name for name in model.state_dict() if name not in tied]
        return {self.original(name): name for name in ours}

    def original(self, name: str) -> str:
        """The name of a tensor in the original files; a name without a rule is the same there."""
        for pattern, said in self.table.items():
            if (found := re.match(rf"{pattern}(?=\.|$)", name)) is not None:
                layer, dot, rest = name[found.end() + 1 :].partition(".")
                return f"{found.expand(said)}.{self.layers.get(layer, layer)}{dot}{rest}".removesuffix(".")
        return name


def _dit(shapes: Shapes, told: Mapping[str, Any]) -> Any:
    width = shapes[PATCH_KEY][0]
    heads = told.get("num_heads", width // HEAD_WIDTH)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"a width of {width} is not that of {heads} heads")
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": sum(name.endswith(".self_attn.q.weight") for name in shapes),
        "patch_size": shapes[PATCH_KEY][2:],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": told.get("eps", 1e-6),
    }
    return build_dit(config, in_channels=shapes[PATCH_KEY][1])


def _vae(shapes: Shapes, told: Mapping[str, Any]) -> Any:
    """There is one VAE for all sizes of Wan2.1, with diffusers' defaults; the file only gives its width."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        return AutoencoderKLWan(base_dim=shapes["encoder.conv1.weight"][0])


def _text(shapes: Shapes, told: Mapping[str, Any]) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    vocabulary, width = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes["blocks.0.attn.q.weight"][0] // heads,
        d_ff=shapes["blocks.0.ffn.fc1.weight"][0],
        num_layers=sum(name.endswith(".attn.q.weight") for name in shapes),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        architectures=[UMT5EncoderModel.__name__],
    )
    with torch.device("meta"):
        return UMT5EncoderModel(config)


DIT = OriginalPart(
    *("transformer", "diffusion_pytorch_model", "diffusion_pytorch_model", "blocks.0.self_attn.q.weight", _DIT, _dit)
)
VAE = OriginalPart("vae", "diffusion_pytorch_model", "Wan2.1_VAE.pth", "decoder.conv1.weight", _VAE, _vae, _VAE_LAYERS)
TEXT = OriginalPart(
    *("text_encoder", "model", "models_t5_umt5-xxl-enc-bf16.pth", "token_embedding.weight", _TEXT, _text)
)
PARTS = (DIT, VAE, TEXT)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
TOKENIZER_FOLDER = "google/umt5-xxl"
