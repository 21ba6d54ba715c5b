"""The DiT: every recorded intermediate, the output, widening for direct video injection, parameter order."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flowmask.models.dit import PATCH_KEY, build_dit, velocity, widen
from flowmask.models.strict import check_shapes
from flowmask.models.weights.flowrvs import reference_order
from parity.core import Check, ParitySet, names_are, near, same

TOLERANCE = {"abs": 2e-5, "rel": 1e-4}
INPUTS = ("hidden_states", "video_condition", "timestep", "encoder_hidden_states")
NOT_ARGUMENTS = ("use_dvi", "patch_embedding_in_channels")


def load_dit(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """The recorded DiT, built strictly as in our loader; the weights tell its channels."""
    arguments = {key: value for key, value in config.items() if key not in NOT_ARGUMENTS}
    dit = build_dit(arguments, in_channels=weights[PATCH_KEY].shape[1])
    shapes = {key: tuple(value.shape) for key, value in dit.state_dict().items()}
    check_shapes(shapes, {k: tuple(v.shape) for k, v in weights.items()}, where="parity set", fix="")
    dit.load_state_dict({key: value.clone() for key, value in weights.items()}, assign=True)
    return dit


def recorded_dit(data: ParitySet, case: str) -> Any:
    return load_dit(data.record(f"{case}/config.json"), data.tensors(f"{case}/weights.safetensors"))


@torch.no_grad()
def predict(dit: Any, io: Mapping[str, Tensor], **changed: Tensor) -> Tensor:
    given = {
        "x_t": io["hidden_states"],
        "video_latent": io["video_condition"],
        "timestep": io["timestep"],
        "text": io["encoder_hidden_states"],
    }
    return velocity(dit, **{**given, **changed})


def intermediates(dit: Any, io: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our intermediates under the reference's names, seen by hooks while our velocity is computed."""
    seen: dict[str, Tensor] = {}

    def embedded(_module: Any, _args: Any, out: Any) -> None:
        seen.update({"inter.temb": out[0], "inter.timestep_proj": out[1], "inter.text": out[2]})

    def turned(_module: Any, _args: Any, out: Any) -> None:
        seen["inter.rope_cos"] = out[0][0, :, 0, 0::2]
        seen["inter.rope_sin"] = out[1][0, :, 0, 1::2]

    def patched(_module: Any, _args: Any, out: Tensor) -> None:
        seen["inter.patch_tokens"] = out.flatten(2).transpose(1, 2)

    def passed(_module: Any, _args: Any, out: Tensor, *, name: str) -> None:
        seen[name] = out

    handles = [
        dit.condition_embedder.register_forward_hook(embedded),
        dit.rope.register_forward_hook(turned),
        dit.patch_embedding.register_forward_hook(patched),
    ]
    for i, block in enumerate(dit.blocks):
        handles.append(block.register_forward_hook(functools.partial(passed, name=f"inter.block{i}")))
    seen["output"] = predict(dit, io)
    for handle in handles:
        handle.remove()
    return seen


def _config_checks(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[Check]:
    channels = weights[PATCH_KEY].shape[1]
    width = weights[PATCH_KEY].shape[0]
    blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    text = weights["condition_embedder.text_embedder.linear_1.weight"].shape[1]
    frequencies = weights["condition_embedder.time_embedder.linear_1.weight"].shape[1]
    hidden = weights["blocks.0.ffn.net.0.proj.weight"].shape[0]
    told = {
        "num_layers": blocks,
        "text_dim": text,
        "freq_dim": frequencies,
        "ffn_dim": hidden,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": list(weights[PATCH_KEY].shape[2:]),
        "use_dvi": channels == 32,
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
        "image_dim": None,
        "added_kv_proj_dim": None,
    }
    for key, value in told.items():
        yield Check(f"config.{key}", lambda key=key, value=value: same(config[key], value))
    yield Check("config.heads", lambda: same(config["num_attention_heads"] * config["attention_head_dim"], width))
    given = config.get("patch_embedding_in_channels", 16)
    yield Check("config.patch_embedding_in_channels", lambda: same(given, channels))


def dit_checks(data: ParitySet, case: str) -> Iterator[Check]:
    config, weights = data.record(f"{case}/config.json"), data.tensors(f"{case}/weights.safetensors")
    io = data.tensors(f"{case}/io.safetensors")
    order = data.record(f"{case}/param_order.json")["reference"]
    dit = functools.cache(lambda: recorded_dit(data, case))
    ours = functools.cache(lambda: intermediates(dit(), io))

    inner = ("patch_tokens", "temb", "timestep_proj", "text", "rope_cos", "rope_sin")
    expected = [f"inter.{name}" for name in inner]
    expected += [f"inter.block{i}" for i in range(config["num_layers"])] + ["output"]
    yield from names_are(io, (*INPUTS, *expected))
    for name in expected:
        tolerance = {"abs": 1e-6} if "rope" in name else TOLERANCE
        yield Check(name, lambda name=name, t=tolerance: near(ours()[name], io[name], **t))
    yield from _config_checks(config, weights)
    yield Check("param_order", lambda: same(reference_order(sorted(dit().state_dict())), order))
    if not config["use_dvi"]:
        other = -io["video_condition"]
        yield Check(
            "output ignores the video", lambda: same(predict(dit(), io, video_latent=other), predict(dit(), io))
        )


def init_checks(data: ParitySet, case: str) -> Iterator[Check]:
    """A plain DiT and its widened form have the same output, for any video."""
    config, weights = data.record(f"{case}/config.json"), data.tensors(f"{case}/weights.safetensors")
    io, init = data.tensors(f"{case}/io.safetensors"), data.tensors(f"{case}/init.safetensors")
    before, bias = init[f"pre.{PATCH_KEY}"], init["pre.patch_embedding.bias"]

    def output(patch: Tensor) -> Tensor:
        state = {**weights, PATCH_KEY: patch, "patch_embedding.bias": bias}
        return predict(load_dit(config, state), io)

    post = (f"post.{PATCH_KEY}", "post.patch_embedding.bias")
    pre = (f"pre.{PATCH_KEY}", "pre.patch_embedding.bias")
    yield from names_are(init, (*pre, *post, "output_at_init"))
    yield Check(post[0], lambda: same(widen(before), init[post[0]]))
    yield Check(post[1], lambda: same(bias, init[post[1]]))
    yield Check("output_at_init", lambda: near(output(widen(before)), init["output_at_init"], **TOLERANCE))
    yield Check("output_at_init of the plain model", lambda: near(output(before), init["output_at_init"], **TOLERANCE))
