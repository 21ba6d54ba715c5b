"""Published FlowRVS training files (.pth) to plain state dicts, read without executing their content.

Knows the two layouts. A DiT trainer's file (`model`, `ema_model`, ...) has EMA weights as a bare list in
the reference's own parameter order. A mask decoder's file is a whole VAE under `vae.`. Each may also be the state
dict alone. Refuses missing, unexpected or reshaped weights, files without weights, and DiTs of other projects.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowmask.models.decoders.either import network_of
from flowmask.models.dit import LATENT_CHANNELS, PATCH_KEY, build_dit
from flowmask.models.errors import WeightsError
from flowmask.models.stored.sealed import SEAL
from flowmask.models.strict import check_shapes, exported_settings
from flowmask.models.weights.foreign import refuse_foreign
from flowmask.models.weights.pickled import plain_tensors, read_pickle

NOT_AVERAGED = "not_averaged"  # in the settings if averaged weights were requested but missing
SETTINGS = "flowmask"  # key of the conventions in FlowMask's files; published files have none
_FIX = "Give a file that FlowRVS's training wrote"
_HEAD = (
    "scale_shift_table",
    *(f"patch_embedding.{kind}" for kind in ("weight", "bias")),
    *(
        f"condition_embedder.{layer}.{kind}"
        for layer in (
            "time_embedder.linear_1",
            "time_embedder.linear_2",
            "time_proj",
            "text_embedder.linear_1",
            "text_embedder.linear_2",
        )
        for kind in ("weight", "bias")
    ),
)
_ATTENTION = (
    *(f"{norm}.weight" for norm in ("norm_q", "norm_k")),
    *(f"{layer}.{kind}" for layer in ("to_q", "to_k", "to_v", "to_out.0") for kind in ("weight", "bias")),
)
_BLOCK = (
    "scale_shift_table",
    *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in _ATTENTION),
    *(f"{layer}.{kind}" for layer in ("norm2", "ffn.net.0.proj", "ffn.net.2") for kind in ("weight", "bias")),
)
_TAIL = ("proj_out.weight", "proj_out.bias")
_DECODER = ("vae.decoder.", "vae.post_quant_conv.")
_ENCODER = ("vae.encoder.", "vae.quant_conv.")


def reference_order(names: Iterable[str]) -> list[str]:
    """The parameter names of a DiT in the order of the reference's `parameters()`, from names in any order.

    It differs from diffusers' order in each attention: the reference lists norm_q and norm_k before to_q,
    to_k, to_v and to_out. Every name of a DiT with this number of blocks is listed; the caller compares the sets.
    """
    found = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    blocks = len({match[1] for match in found if match})  # a name may have any number
    inner = [f"blocks.{i}.{name}" for i in range(blocks) for name in _BLOCK]
    return [*_HEAD, *inner, *_TAIL]


def load_dit(path: Path, *, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """DiT weights by diffusers' names, fp32 of the file's shapes, and its settings (`video_injection`).

    ema: the averaged weights, mapped by name through `reference_order`; if the file has none, the last ones, and
    the settings then hold `NOT_AVERAGED`.
    """
    content = read_pickle(path, fix=_FIX)
    raw = "model" not in content and any(isinstance(value, Tensor) for value in content.values())
    model = plain_tensors(content if raw else content.get("model"), path, where=f"{path}: `model`", fix=_FIX)
    order = reference_order(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.items()}
    refuse_foreign(shapes, where=path)
    check_shapes({name: shapes.get(name, ()) for name in order}, shapes, where=f"{path}: `model`", fix=_FIX)
    check_shapes(_implied_shapes(shapes, path), shapes, where=f"{path}: `model`", fix=_FIX)
    settings = {**_settings(content, path), "video_injection": shapes[PATCH_KEY][1] == 2 * LATENT_CHANNELS}
    if ema and content.get("ema_model") is None:
        settings[NOT_AVERAGED] = True
    if not ema or NOT_AVERAGED in settings:
        return {name: tensor.float() for name, tensor in model.items()}, settings
    averaged = dict(zip(order, _shadows(content, len(order), path), strict=True))
    where = f"{path}: `ema_model`"
    check_shapes(shapes, {name: tuple(t.shape) for name, t in averaged.items()}, where=where, fix=_FIX)
    return {name: averaged[name].float() for name in model}, settings


def load_mask_decoder(path: Path, *, ema: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The decoder half of a mask decoder file: `decoder.*`, `post_quant_conv.*`, fp32 of the file's shapes.

    ema: accepted for symmetry; these files hold one set of weights. The settings are empty unless FlowMask wrote it.
    """
    content = read_pickle(path, fix=_FIX)
    return _halves(path, content)[0], _settings(content, path)


def load_encoder(path: Path) -> dict[str, Tensor]:
    """The encoder half of a decoder file (`encoder.*`, `quant_conv.*`), of any shape; FlowRVS encodes with it."""
    return _halves(path, read_pickle(path, fix=_FIX))[1]


def stored_settings(path: Path) -> dict[str, Any]:
    """The conventions recorded by a FlowMask export; no tensor is read into memory."""
    return _settings(read_pickle(path, fix=_FIX, mapped=True), path)


def refuse_renamed_settings(sealed: Iterable[object], *, where: Path) -> None:
    """WeightsError if something with FlowMask's seal has not the name SETTINGS, which then is damaged."""
    if strangers := [str(name) for name in sealed if name != SETTINGS]:
        raise WeightsError(
            f"{where} is damaged (FlowMask's settings are there as {strangers[0][:40]!r}, not as {SETTINGS!r}); "
            "export it again, or get it again"
        )


def _settings(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The conventions recorded by a FlowMask export; empty for a published file."""
    sealed = (name for name, value in content.items() if isinstance(value, Mapping) and SEAL in value)
    refuse_renamed_settings(sealed, where=path)
    return exported_settings(content.get(SETTINGS, {}), where=f"{path}: `{SETTINGS}`")


def _halves(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    where = f"{path}: the VAE"
    state = plain_tensors(content.get("model", content), path, where=where, fix=_FIX)
    if network_of(state, where=path) is not None:  # a light decoder's state dict, which is checked at its use
        return {name: tensor.float() for name, tensor in state.items()}, {}
    if "decoder.conv_out.weight" in state:  # with the VAE's own names
        state = {f"vae.{name}": tensor for name, tensor in state.items()}
    strangers = [key for key in state if not key.startswith((*_DECODER, *_ENCODER))]
    if strangers:
        raise WeightsError(
            f"{where} has {len(strangers)} keys that a VAE does not have ({', '.join(strangers[:3])[:200]}). {_FIX}"
        )
    last = state.get("vae.decoder.conv_out.weight")
    if last is None or last.shape[:1] != (1,):
        channels = "no" if last is None or not last.ndim else last.shape[0]
        raise WeightsError(f"{where} decodes to {channels} channels; a mask decoder has 1. {_FIX}")
    decoder, encoder = (
        {key.removeprefix("vae."): tensor.float() for key, tensor in state.items() if key.startswith(half)}
        for half in (_DECODER, _ENCODER)
    )
    return decoder, encoder


def _shadows(content: Mapping[str, Any], count: int, path: Path) -> list[Tensor]:
    ema = content.get("ema_model")
    shadows = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadows, list) or not all(isinstance(item, Tensor) for item in shadows):
        raise WeightsError(f"{path} has no list `ema_model.shadow_params`; ask for the last weights: ema=false")
    if len(shadows) != count:
        raise WeightsError(f"{path}: `ema_model` has {len(shadows)} tensors, the model {count}. {_FIX}")
    return shadows


def _implied_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, tuple[int, ...]]:
    """Every shape of a DiT, from the widths of a few tensors; shapes do not depend on the heads."""
    patch = shapes[PATCH_KEY]
    try:
        config = {
            "num_attention_heads": 1,
            "attention_head_dim": patch[0],
            "num_layers": sum(name.endswith(".norm2.weight") for name in shapes),
            "patch_size": patch[2:],
            "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
            "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
            "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
            "rope_max_seq_len": 1,
        }
        dit = build_dit(config, in_channels=patch[1])
    except (KeyError, IndexError, RuntimeError, ValueError, AssertionError) as error:
        raise WeightsError(f"{path}: `model` is no Wan DiT ({type(error).__name__}: {error}). {_FIX}") from None
    return {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
