"""The Wan DiT of diffusers: construction without weights, video injection, velocity, and speed settings.

FlowMask has no DiT of its own: `WanTransformer3DModel(in_channels=32)` with concat([x_t, video]) is the reference's.
"""

import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flowmask.models.config import Attention, Recompute
from flowmask.models.device import seeded
from flowmask.models.errors import ConfigError

LATENT_CHANNELS = 16
PATCH_KEY = "patch_embedding.weight"
_LEFT_S = 3600.0  # longer than a compiler takes; torch waits 600 s for another process that compiles
_KEPT = ("scaled_dot_product", "_flash_attn_forward")  # parts of the names of attention ops: torch's, flash-attn's


class _Float32Rope(WanRotaryPosEmbed):
    """Rotary angles that move with the device but stay float32: bfloat16 would merge neighbouring positions."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Float32Rope":
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def build_dit(config: Mapping[str, Any], *, in_channels: int, device: str = "meta") -> WanTransformer3DModel:
    """A DiT with parameters on the meta device, ready for weights; its rotary table is real.

    config: constructor arguments of WanTransformer3DModel; in_channels: 16, or 32 with the video injected.
    """
    with torch.device(device):
        dit = WanTransformer3DModel(**{**config, "in_channels": in_channels, "out_channels": LATENT_CHANNELS})
    dit.rope = _Float32Rope(dit.config.attention_head_dim, dit.config.patch_size, dit.config.rope_max_seq_len)
    use_attention(dit, "native", key="attention")
    return dit


def random_dit(config: Mapping[str, Any], *, in_channels: int, seed: int) -> WanTransformer3DModel:
    """The same with parameters on the CPU, float32, initialised by diffusers' layers from `seed`."""
    with seeded(seed):
        return build_dit(config, in_channels=in_channels, device="cpu")


def widen(weight: Tensor) -> Tensor:
    """Patch embedding [D 16 1 2 2] -> [D 32 1 2 2] for [x_t, video]: Wan's weights, then zeros for the video.

    At first the widened model is equal to the plain one; the bias is unchanged.
    """
    return torch.cat([weight, torch.zeros_like(weight)], dim=1)


def velocity(
    dit: WanTransformer3DModel, *, x_t: Tensor, video_latent: Tensor, timestep: Tensor, text: Tensor
) -> Tensor:
    """The DiT's predicted velocity at a point of the path.

    x_t [B 16 f h w]    video_latent [B 16 f h w] norm, injected only if the DiT takes 32 channels
    timestep [B] 1..1000, int64 or float32 (never bfloat16, which has no 437)    text [B L D] zero padded
    returns float32 [B 16 f h w] velocity, for any dtype of the weights
    """
    dtype = dit.patch_embedding.weight.dtype
    injected = dit.patch_embedding.in_channels > x_t.shape[1]
    hidden = torch.cat([x_t, video_latent], dim=1) if injected else x_t
    out = dit(
        hidden_states=hidden.to(dtype), timestep=timestep, encoder_hidden_states=text.to(dtype), return_dict=False
    )
    return out[0].float()


def recompute_blocks(dit: nn.Module, kind: Recompute, *, compiled: bool = False) -> None:
    """Drop activations in the forward pass and recompute them in the backward pass; losses are bit-identical.

    full: a block keeps only its input. selective: also the results of attention and of narrow matrix products,
    so only the feed-forward's wide product is computed twice. compiled: see `compile_blocks`.
    """
    assert isinstance(dit, WanTransformer3DModel)
    if kind == "none":
        return
    if kind == "full":
        dit.enable_gradient_checkpointing()
        return
    width = dit.config.num_attention_heads * dit.config.attention_head_dim
    contexts = partial(create_selective_checkpoint_contexts, partial(_what_to_keep, width))

    def run(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    dit.enable_gradient_checkpointing(torch.compile(run) if compiled else run)


def _what_to_keep(width: int, context: Any, op: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Keeps results of attention, and of matrix products with rows not wider than the model.

    Only products that add their bias themselves. DeepSpeed's ZeRO 3 replaces torch's linear layer (for the rest of the
    process) by one that adds the bias in place: a kept result would get the bias twice, and torch would not detect it.
    """
    product = op is torch.ops.aten.addmm.default and inputs[-1].shape[-1] <= width
    if product or any(words in op.__name__ for words in _KEPT):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@dataclass(frozen=True)
class Kernels:
    """An attention kernel: diffusers' name, the package to install, the oldest GPU, the widest head."""

    backend: AttentionBackendName
    needs: str = ""
    capability: tuple[int, int] = (0, 0)
    widest: int = 0


KERNELS: dict[Attention, Kernels] = {
    "native": Kernels(AttentionBackendName.NATIVE),
    "cudnn": Kernels(AttentionBackendName._NATIVE_CUDNN, "a CUDA build of torch", (8, 0), 128),
    "flash": Kernels(AttentionBackendName.FLASH, "flash-attn 2.6.3 or later, built for this torch", (8, 0), 256),
    "flash3": Kernels(AttentionBackendName._FLASH_3, "FlashAttention 3 (flash_attn_interface)", (9, 0), 256),
    "sage": Kernels(AttentionBackendName.SAGE, "sageattention 2.1.1 or later", (8, 0), 128),
}


def require_attention(name: Attention, *, key: str, device: torch.device) -> None:
    """Raises ConfigError if `device` can't use this attention kernel. key: the config key of `name`."""
    if name == "native":
        return
    kernels, otherwise = KERNELS[name], f"set {key} to native"
    if device.type != "cuda":
        raise ConfigError(f"{key} is {name}, which needs a GPU, but the device is the CPU: use a GPU, or {otherwise}")
    found = torch.cuda.get_device_capability(device)
    if found < kernels.capability:
        wanted, has = (".".join(map(str, version)) for version in (kernels.capability, found))
        raise ConfigError(
            f"{key} is {name}, which needs a GPU of compute capability {wanted}; this one has {has}: {otherwise}"
        )
    try:
        _check_attention_backend_requirements(kernels.backend)
    except RuntimeError as error:
        raise ConfigError(f"{key} is {name}, which needs {kernels.needs}: install it, or {otherwise}") from error


def use_attention(dit: nn.Module, name: Attention, *, key: str) -> None:
    """Use this attention kernel only in this DiT. Call `require_attention` first.

    The name is stored at the layers, because diffusers' own setter and its environment variable would affect every
    model of the process. Wan's DiT uses attention without a mask; the other kernels do not support masks.
    """
    assert isinstance(dit, WanTransformer3DModel)
    kernels, head = KERNELS[name], int(dit.config.attention_head_dim)
    if name != "native" and (head > kernels.widest or head % 8):
        raise ConfigError(
            f"{key} is {name}, whose heads are 8, 16 ... {kernels.widest} wide; those of this DiT are {head} wide: "
            f"set {key} to native"
        )
    for part in dit.modules():
        if isinstance(part, AttentionModuleMixin):
            processor: Any = part.processor
            processor._attention_backend = kernels.backend


def compile_blocks(dit: nn.Module, *, recompute: Recompute) -> None:
    """Compile the blocks, which share one program, on first use; raises ConfigError without a compiler."""
    assert isinstance(dit, WanTransformer3DModel)
    require_compiler()
    recompute_blocks(dit, recompute, compiled=True)
    if recompute != "selective":  # with selective the recomputing call is compiled
        dit.compile_repeated_blocks()


def require_compiler() -> None:
    """Prepare torch's compiler; raises ConfigError without one. Call it before anything is compiled."""
    from torch.utils._triton import has_triton

    if torch.cuda.is_available():
        if not has_triton():
            raise ConfigError("train.compile is true, but there is no triton here; set it to false")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "train.compile is true, but no C++ compiler works here; install g++ or set it to false"
        ) from error
    _write_programs_whole()
    try:
        _tell_cpus_apart()
    except OSError as error:
        raise ConfigError(
            f"train.compile is true, but torch's folder of compiled programs, {os.environ['TORCHINDUCTOR_CACHE_DIR']},"
            f" can't be written ({error.strerror}): set TORCHINDUCTOR_CACHE_DIR to another, or train.compile to false"
        ) from error


def _tell_cpus_apart() -> None:
    """Add this CPU's vector width to the key of torch's cache of compiled programs, which lacks it.

    Otherwise code generated for AVX2 could come from a shared folder, be compiled for AVX-512, and write out of
    bounds.
    """
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    config.cpp.simdlen = pick_vec_isa().bit_width()


@cache
def _write_programs_whole() -> None:
    """Have torch's compilers write beside a file of the cache, and rename it when it is complete.

    They write in place, and torch takes whatever file it finds. A process killed meanwhile would leave a cut program
    that ends every later run, or a cut test of this CPU's vectors, without which torch uses none and says nothing.
    """
    from torch._inductor import cpp_builder

    compile_in_place = cpp_builder.run_compile_cmd

    def compile_beside(cmd_line: str, cwd: str) -> None:
        words = shlex.split(cmd_line)
        target = Path(words[words.index("-o") + 1])
        for left in target.parent.glob(f"{target.name}.*"):
            if time.time() - left.stat().st_mtime > _LEFT_S:  # of a killed process
                left.unlink(missing_ok=True)
        beside = target.with_name(f"{target.name}.{os.getpid()}")
        words[words.index("-o") + 1] = str(beside)
        compile_in_place(shlex.join(words), cwd)
        beside.replace(target)

    cpp_builder.run_compile_cmd = compile_beside
