"""Wan2.1 as published, without its numbers: exact configs, and weights that are holes in sparse files.

A hole reads as zeros and takes no space on a disk. Names and shapes are those of diffusers' and transformers' models
with the published configs.
"""

import json
import struct
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from shutil import copyfile
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from flowmask.models.strict import SafetensorsFolder
from flowmask.models.weights.tiny_wan import PARTS, SCHEDULER

TOKENIZER = Path(__file__).parents[1] / "golden" / "parity" / "text" / "tokenizer" / "tokenizer.json"
SHARD_BYTES = 5 * 10**9
_DIT = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
DITS: dict[str, dict[str, Any]] = {
    "1.3B": {**_DIT, "ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30},
    "14B": {**_DIT, "ffn_dim": 13824, "num_attention_heads": 40, "num_layers": 40},
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.33.0.dev0",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    ],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
UMT5: dict[str, Any] = {
    "_name_or_path": "google/umt5-xxl",
    "architectures": ["UMT5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "umt5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "scalable_attention": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer",
    "torch_dtype": "float32",
    "transformers_version": "4.48.0.dev0",
    "use_cache": True,
    "vocab_size": 256384,
}


@cache
def shapes_of(part: str, size: str = "1.3B") -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a part's tensors in diffusers or transformers."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        if part == "transformer":
            known: Any = {k: v for k, v in DITS[size].items() if not k.startswith("_")}
            model: Any = WanTransformer3DModel(**known)
        elif part == "vae":
            model = AutoencoderKLWan(**{k: v for k, v in VAE.items() if not k.startswith("_")})
        else:
            model = UMT5EncoderModel(UMT5Config.from_dict(dict(UMT5)))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # the same table as shared.weight; it is stored once
    return MappingProxyType(shapes)


def write_published(folder: Path, size: str = "1.3B") -> Path:
    """The folder Wan2.1-T2V-<size>-Diffusers, with fp32 zeros that take no space on a disk."""
    parts = {"transformer": DITS[size], "vae": VAE, "text_encoder": UMT5, "scheduler": SCHEDULER}
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(config, indent=2))
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        write_shards(folder / part, stem, shapes_of(part, size))
    write_hole(folder / "vae" / "diffusion_pytorch_model.safetensors", shapes_of("vae"))
    (folder / "tokenizer").mkdir()
    copyfile(TOKENIZER, folder / "tokenizer" / "tokenizer.json")
    index = {"_class_name": "WanPipeline", "_diffusers_version": "0.33.0.dev0", **PARTS}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_shards(folder: Path, stem: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Shards of at most 5 GB in the order of the names, and their index."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(_bytes, (*shards[-1].values(), shape))) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_hole(folder / name, shard)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": sum(map(_bytes, shapes.values()))}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_hole(file: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of fp32 zeros: a header and a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _bytes(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in the header of a safetensors file of any size."""
    with file.open("rb") as content:
        header = json.loads(content.read(struct.unpack("<Q", content.read(8))[0]))
    return {name: tuple(one["shape"]) for name, one in header.items() if name != "__metadata__"}


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * torch.Size(shape).numel()


def hole_of(tensors: Mapping[str, Tensor], file: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Replaces safetensors' `save_file`: writes names and shapes alone."""
    write_hole(Path(file), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, metadata)


def meta_of(folder: SafetensorsFolder, key: str) -> Tensor:
    """Replaces reading a stored tensor: gives its shape alone."""
    return torch.empty(folder._home[key][0].get_slice(key).get_shape(), device="meta")


def meta_file(file: Path) -> dict[str, Tensor]:
    """Replaces safetensors' `load_file`."""
    with SafetensorsFolder(file.parent, file.name.removesuffix(".safetensors")) as weights:
        return {key: weights.stored(key) for key in weights.shapes()}


def names_sha256(state: Mapping[str, Tensor]) -> str:
    """Replaces the hash of values: a hash of names and shapes."""
    return sha256(str(sorted((name, tuple(tensor.shape)) for name, tensor in state.items())).encode()).hexdigest()


def never_read(patch: pytest.MonkeyPatch) -> None:
    """Let all code that reads, hashes, checks or writes weights use names and shapes alone."""
    import safetensors.torch

    from flowmask.models import lora, strict
    from flowmask.trainer.predict import adapters, export, weights
    from flowmask.trainer.run import start

    patch.setattr(strict.SafetensorsFolder, "stored", meta_of)
    patch.setattr(adapters, "load_file", meta_file)
    for module in (export, lora, safetensors.torch):
        patch.setattr(module, "save_file", hole_of)
    for module in (export, weights, start):
        patch.setattr(module, "content_sha256", names_sha256)
    for module in (strict, weights, start):
        patch.setattr(module, "refuse_not_finite", lambda *_, **__: None)
