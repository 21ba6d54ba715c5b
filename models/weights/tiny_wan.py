"""A tiny Wan2.1 checkpoint in exactly the diffusers layout, so the code that loads the real one runs anywhere.

Defines the tiny architecture: a random DiT (sharded), a random UMT5 encoder with its own small tokenizer, and the VAE
that `tools/train_tiny_vae.py` made from synthetic clips, stored in models/tiny. It knows nothing of language or of
other videos: it is for demos, tests and dry runs. Same seed, same bytes.
"""

import json
from importlib import resources
from pathlib import Path
from shutil import copyfile
from typing import Any

from safetensors.torch import save_file
from torch import nn

from flowmask.models.device import seeded
from flowmask.models.errors import WeightsError
from flowmask.models.files import move_new
from flowmask.models.folders.scratch import scratch

TEXT_DIM = 64
TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
TEXT_ENCODER: dict[str, Any] = {
    "d_model": TEXT_DIM,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "predict_x0": True,
    "solver_order": 2,
    "solver_type": "bh2",
    "thresholding": False,
    "timestep_spacing": "linspace",
    "use_flow_sigmas": True,
}
PARTS = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")  # ids 0 to 3, as in UMT5's tokenizer
WORDS = (
    "a all an and are at away back behind big blue bottom by chair circle circles dark down falling falls first "
    "front glass go goes going green grey in inside is it its large left light long move moves moving near not "
    "object objects of off on one ones orange out person pink purple red reflection right seen shape shapes side "
    "small square squares stand standing stands stay stays still that the them thing things to top triangle "
    "triangles two under up walking walks which white with yellow black"
)


def write_tiny_wan(folder: Path, *, seed: int = 0, random_vae: bool = False) -> None:
    """Write a tiny Wan2.1 folder (about 5 MB): transformer/ vae/ text_encoder/ tokenizer/ scheduler/ model_index.json.

    random_vae: use a random VAE of the same architecture in place of the trained one. Refuses (WeightsError) a
    `folder` with other contents.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch(folder.parent) as place:  # first clears those of killed writers
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise WeightsError(f"{folder} exists and is not an empty folder; choose another for the tiny Wan")
        _write_parts(place / folder.name, seed=seed, random_vae=random_vae)
        move_new(place / folder.name, folder)


def _write_parts(folder: Path, *, seed: int, random_vae: bool) -> None:
    folder.mkdir()
    with seeded(seed):
        _write_transformer(folder / "transformer")
        _write_text_encoder(folder / "text_encoder")
        _write_vae(folder / "vae", random=random_vae)
    _write_tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline", **PARTS})


def _write_transformer(folder: Path) -> None:
    from diffusers import WanTransformer3DModel

    dit: Any = WanTransformer3DModel(**TRANSFORMER)
    dit.save_pretrained(folder, max_shard_size="2MB")


def _write_text_encoder(folder: Path) -> None:
    """A random encoder; its position biases are wide, so its outputs depend on the order of words."""
    from transformers import UMT5Config, UMT5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # not needed for a few MB
    config = UMT5Config(vocab_size=len(_vocabulary()), num_decoder_layers=2, **TEXT_ENCODER)
    model = UMT5EncoderModel(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("relative_attention_bias.weight"):
            nn.init.normal_(weight, std=1.5)
    folder.mkdir(parents=True)  # not save_pretrained: it imports DeepSpeed to check the model's class
    config.dtype, config.architectures = "float32", [type(model).__name__]
    config.save_pretrained(folder)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in model._tied_weights_keys}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_vae(folder: Path, *, random: bool) -> None:
    packaged = resources.files("flowmask.models") / "tiny"
    if not random:
        folder.mkdir()
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            with resources.as_file(packaged / name) as source:
                copyfile(source, folder / name)
        return
    from diffusers import AutoencoderKLWan

    settings = json.loads((packaged / "config.json").read_text())
    vae: Any = AutoencoderKLWan(**{k: v for k, v in settings.items() if not k.startswith("_")})
    vae.save_pretrained(folder)


def _vocabulary() -> list[tuple[str, float]]:
    """Unigram pieces with log probabilities: whole words cost least, then letters; bytes cover everything else."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [(piece, 0.0) for piece in SPECIAL]
    pieces += [("▁" + word, -4.0) for word in WORDS.split()]
    pieces += [("▁", -6.0), *((letter, -7.0) for letter in letters)]
    return pieces + [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]


def _write_tokenizer(folder: Path) -> None:
    """UMT5's interface (pad 0, eos 1, one eos after the sentence) over a vocabulary of words, letters and bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import Unigram

    tokenizer = Tokenizer(Unigram(_vocabulary(), unk_id=SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    write_json(folder / "special_tokens_map.json", names)
    described = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0}
    write_json(folder / "tokenizer_config.json", {**described, "clean_up_tokenization_spaces": False, **names})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One JSON file of a weights folder; makes the folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
