"""One forward pass of each model, the machine, and the rate of its largest matrix product."""

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmask.data_pipeline.build.encode import channels_last
from flowmask.models.config import ModelConfig
from flowmask.models.cost.flops import dit_forward_flop
from flowmask.models.device import use_tf32
from flowmask.models.dit import require_compiler, velocity
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.vae import encode_moments
from flowmask.trainer.track.meters import peak_tflops
from gpu.lab import GB, Lab

WORDS = 16  # tokens of a sentence
_BATCH = 64  # sentences in a batch
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
Made = tuple[torch.nn.Module, Callable[[], object], float, float]  # module, its pass, FLOP, planned bytes of a pass
Encode = tuple[torch.nn.Module, Callable[[], tuple[Tensor, Tensor]], float, float]


def machine(lab: Lab) -> dict[str, Any]:
    """The machine of all measurements."""
    found: dict[str, Any] = {"scale": lab.scale.name, "device": platform.processor() or platform.machine()}
    if lab.gpu:
        facts = torch.cuda.get_device_properties(lab.device)
        found |= {"device": facts.name, "gpu_gb": facts.total_memory / GB, "cuda": torch.version.cuda}
        found["peak_tflops"] = peak_tflops(facts.name)
    return found | {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}


def matrix(precision: str, lab: Lab) -> dict[str, Any]:
    """The product of two square matrices: the largest rate that a GPU reaches."""
    use_tf32(precision == "tf32")
    side = lab.scale.matrix
    a, b = torch.randn(2, side, side, device=lab.device).to(DTYPES[precision])
    seconds = lab.seconds(lambda: a @ b)
    return {"side": side, "seconds": seconds, **lab.shares(2.0 * side**3, seconds)}


def model(name: str, precision: str, lab: Lab) -> dict[str, Any]:
    """A pass of one clip or of sentences, and its peak memory beside the plan's."""
    use_tf32(precision == "tf32")
    module, run, flop, planned = MODELS[name](lab, DTYPES[precision])
    weights = sum(p.nbytes for p in module.parameters())
    with torch.no_grad():
        seconds = lab.seconds(run)
    expected = {"planned_tensors_gb": (weights + planned) / GB}
    return {"seconds": seconds, **lab.shares(flop, seconds), **lab.memory(), **expected}


def encoder(way: str, precision: str, lab: Lab) -> dict[str, Any]:
    """The VAE's encoder in another way: its time, and its largest difference to the plain pass in % of its range."""
    use_tf32(precision == "tf32")
    vae, run, flop, _ = _vae_encode(lab, DTYPES[precision])
    with torch.no_grad():
        plain = run()
        ENCODER_WAYS[way](vae, lab)
        seconds = lab.seconds(run)
        pairs = list(zip(plain, run(), strict=True))
    apart = max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
    return {"seconds": seconds, **lab.shares(flop, seconds), **lab.memory(), "largest_difference_pct": 100 * apart}


def _channels_last(vae: Any, _: Lab) -> None:
    channels_last(vae)


def _compile_encoder(vae: Any, lab: Lab) -> None:
    require_compiler()
    vae.encoder.compile(backend=lab.scale.encoder_compiler)


def _dit(lab: Lab, dtype: torch.dtype) -> Made:
    dit = lab.drawn(lab.shapes.dit(video_injection=True), dtype).eval()
    tokens = ModelConfig(wan=lab.wan).text_tokens
    x_t, video = torch.randn(2, 1, 16, *lab.clip.latent, device=lab.device)
    text = torch.randn(1, tokens, lab.dit_config["text_dim"], device=lab.device)
    timestep = torch.full((1,), 437, device=lab.device)
    flop = dit_forward_flop(lab.dit_config, lab.clip.latent, text_tokens=tokens)
    planned = lab.encoders.dit(lab.clip, sentences=1, text_tokens=tokens, dtype=dtype)
    return (
        dit,
        lambda: velocity(dit, x_t=x_t, video_latent=video, timestep=timestep, text=text),
        flop,
        planned.peak_bytes,
    )


def _vae_encode(lab: Lab, dtype: torch.dtype) -> Encode:
    vae = lab.drawn(lab.shapes.vae(), dtype).eval()
    clip = torch.rand(1, 3, *lab.scale.clip, device=lab.device) * 2 - 1
    planned = lab.encoders.encode(lab.clip, dtype=str(dtype).removeprefix("torch."))
    return vae, lambda: encode_moments(vae, clip), planned.flop, planned.peak_bytes + clip.nbytes


def _vae_decode(lab: Lab, dtype: torch.dtype) -> Made:
    decoder = MaskDecoder.from_vae(lab.shapes.vae())
    decoder = lab.drawn(decoder, dtype).eval()
    latent = torch.randn(1, 16, *lab.clip.latent, device=lab.device)
    planned = lab.encoders.decode(lab.clip, dtype=str(dtype).removeprefix("torch."))
    return decoder, lambda: decoder(latent), planned.flop, planned.peak_bytes + latent.nbytes


def _umt5(lab: Lab, dtype: torch.dtype, *, sentences: int = 1) -> Made:
    encoder = lab.drawn(lab.shapes.text_encoder(), dtype).eval()
    words = torch.randint(5, 100, (sentences, WORDS), device=lab.device)
    flop = lab.encoders.text_flop(sentences * WORDS, sentences=sentences)

    def run() -> Tensor:
        found: Tensor = encoder(input_ids=words).last_hidden_state
        return found

    return encoder, run, flop, 0.0


def _umt5_batch(lab: Lab, dtype: torch.dtype) -> Made:
    return _umt5(lab, dtype, sentences=_BATCH)


ENCODER_WAYS: dict[str, Callable[[Any, Lab], None]] = {"channels last": _channels_last, "compiled": _compile_encoder}
MODELS: dict[str, Callable[[Lab, torch.dtype], Made]] = {
    "dit": _dit,
    "vae encode": _vae_encode,
    "vae decode": _vae_decode,
    "umt5": _umt5,
    f"umt5 of {_BATCH}": _umt5_batch,
}
