"""A Wan2.1 folder in the diffusers layout, opened strictly: transformer/ vae/ text_encoder/ tokenizer/.

Knows the folder's files and their required content. Refuses missing parts and shards, pickles, keys
that are missing, unexpected or reshaped, and configs of another architecture. Never downloads.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flowmask.models.errors import WeightsError
from flowmask.models.files import sha256_of
from flowmask.models.strict import SafetensorsFolder, check_shapes, read_json
from flowmask.models.text import TextEncoder
from flowmask.models.vae import LatentStats
from flowmask.models.weights.foreign import refuse_channels, refuse_foreign, refuse_foreign_folder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_PARTS = (*_STEMS, "tokenizer")
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
_SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_LARGE, _LARGEST = 1 << 20, {"num_layers": 256, "num_res_blocks": 64}  # larger models would take hours to build
_FIX = "Point model.wan at a complete Wan2.1 folder in the diffusers layout"


class WanFolder:
    """The parts of one checkpoint; each is loaded on request, so a job pays only for the parts it uses."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise WeightsError(f"{self.path} is one file. {_FIX} (to make one of it: flowmask import wan FILE OUT)")
        if not self.path.is_dir():
            raise WeightsError(f"{self.path} is not a folder. {_FIX} (or make one: flowmask tiny-wan DIR)")
        refuse_foreign_folder(self.path)

    def transformer(self, *, video_injection: bool, dtype: torch.dtype = torch.float32) -> "WanTransformer3DModel":
        """The DiT; with `video_injection`, weights of 16 input channels are widened to 32 (new ones zero).

        The file's patch embedding shows which of the two it holds, never its config.
        """
        from flowmask.models.dit import LATENT_CHANNELS, PATCH_KEY, widen

        folder = self._part("transformer")
        with SafetensorsFolder(folder, _STEMS["transformer"]) as weights:
            shapes = weights.shapes()
            refuse_foreign(shapes, where=folder)
            held = shapes.get(PATCH_KEY, (0, LATENT_CHANNELS))[1]
            if held == 2 * LATENT_CHANNELS and not video_injection:
                raise WeightsError(f"{folder} expects the injected video; set objective.video_injection=true")
            dit = self.empty_transformer(video_injection=held == 2 * LATENT_CHANNELS)
            check_shapes(_shapes_of(dit), shapes, where=folder, fix=_FIX)
            state = {key: weights.tensor(key, dtype) for key in shapes}
        if video_injection and held == LATENT_CHANNELS:
            dit = self.empty_transformer(video_injection=True)
            state[PATCH_KEY] = widen(state[PATCH_KEY])
        dit.load_state_dict(state, assign=True)
        return dit

    def empty_transformer(self, *, video_injection: bool) -> "WanTransformer3DModel":
        """The DiT from the config alone, its parameters on the meta device, ready for a training's weights."""
        from flowmask.models.dit import build_dit

        return self._dit_of_config(build_dit, video_injection=video_injection)

    def random_transformer(self, *, video_injection: bool, seed: int) -> "WanTransformer3DModel":
        """The DiT of the config with random weights from `seed`; float32 on the CPU."""
        from flowmask.models.dit import random_dit

        return self._dit_of_config(partial(random_dit, seed=seed), video_injection=video_injection)

    def _dit_of_config(self, build: Callable[..., Any], *, video_injection: bool) -> Any:
        from flowmask.models.dit import LATENT_CHANNELS

        folder = self._part("transformer")
        config = _constructor_config(folder, "WanTransformer3DModel")
        refuse_channels(config.get("in_channels"), where=folder)
        channels = 2 * LATENT_CHANNELS if video_injection else LATENT_CHANNELS
        return _attempt(lambda: build(config, in_channels=channels), folder)

    def vae(self, dtype: torch.dtype = torch.float32) -> "AutoencoderKLWan":
        """The frozen VAE; 16 latent channels, 8x in space and 4x in time."""
        vae = self.empty_vae()
        self._fill(vae, self._part("vae"), dtype)
        return vae.eval().requires_grad_(False)

    def empty_vae(self, **changes: Any) -> "AutoencoderKLWan":
        """The VAE from the config alone, its parameters on the meta device; `changes` to constructor arguments."""
        from diffusers import AutoencoderKLWan

        folder = self._part("vae")
        config = {**_constructor_config(folder, "AutoencoderKLWan"), **changes}
        with torch.device("meta"):
            vae = _attempt(lambda: AutoencoderKLWan(**config), folder)
        if vae.config.z_dim != 16 or vae.config.patch_size is not None:
            raise WeightsError(f"{folder} is not a Wan2.1 VAE (z_dim {vae.config.z_dim}). {_FIX}")
        _check_statistics(vae.config, folder / "config.json")
        return vae

    def latent_stats(self) -> LatentStats | None:
        """Mean and deviation of the VAE's latents; None if the folder has no VAE config with them."""
        config = self.path / "vae" / "config.json"
        told = read_json(config) if config.is_file() else {}
        try:
            return LatentStats.from_lists(told["latents_mean"], told["latents_std"])
        except (KeyError, TypeError, ValueError):
            return None

    def text_encoder(self, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """UMT5 and its tokenizer. The token table may be stored under either of its two names, or both."""
        from transformers import UMT5Config, UMT5EncoderModel

        folder = self._part("text_encoder")
        config = read_json(folder / "config.json")
        if config.get("model_type") != "umt5":
            raise WeightsError(f"{folder}/config.json is for {config.get('model_type')!r}, not umt5. {_FIX}")
        with torch.device("meta"):
            model = _attempt(lambda: UMT5EncoderModel(UMT5Config.from_dict(config)), folder)
        self._fill(model, folder, dtype, tied=_EMBEDDINGS)
        tokenizer = self._tokenizer()
        if len(tokenizer) > model.config.vocab_size:
            raise WeightsError(
                f"{self.path}/tokenizer has {len(tokenizer)} tokens but text_encoder only "
                f"{model.config.vocab_size}: they are of two models. {_FIX}"
            )
        return TextEncoder(tokenizer, model)

    def identity(self, part: str) -> str:
        """SHA-256 over everything that determines a part's numbers: its config and weights, at any place."""
        folder = self._part(part)
        digest = hashlib.sha256()
        if part in _STEMS:
            config = read_json(folder / "config.json")
            kept = {key: value for key, value in config.items() if not key.startswith("_")}
            digest.update(json.dumps(kept, sort_keys=True).encode())
            files = SafetensorsFolder(folder, _STEMS[part]).files
        else:
            files = [folder / "tokenizer.json"]
        for file in files:
            if not file.is_file():
                raise WeightsError(f"{file} is missing; download it again")
            digest.update(bytes.fromhex(sha256_of(file)))
        return digest.hexdigest()

    def _part(self, part: str) -> Path:
        if part not in _PARTS:
            raise WeightsError(f"{part!r} is no part of a Wan2.1 folder; the parts are {', '.join(_PARTS)}")
        folder = self.path / part
        if not folder.is_dir():
            raise WeightsError(f"{folder} is missing. {_FIX}")
        return folder

    def _fill(self, model: nn.Module, folder: Path, dtype: torch.dtype, tied: tuple[str, ...] = ()) -> None:
        """Assign a part's weights to a model on the meta device; names in `tied` are one tensor."""
        with SafetensorsFolder(folder, _STEMS[folder.name]) as weights:
            shapes = weights.shapes()
            twins = [name for name in tied if name in shapes]
            for name in tied if twins else ():
                shapes.setdefault(name, shapes[twins[0]])
            check_shapes(_shapes_of(model), shapes, where=folder, fix=_FIX)
            state = {key: weights.tensor(key, dtype) for key in shapes if key not in tied}
            tables = [weights.tensor(name, dtype) for name in twins]
        if any(not torch.equal(tables[0], other) for other in tables[1:]):
            raise WeightsError(f"{folder} stores two different tables as {' and '.join(twins)}. {_FIX}")
        model.load_state_dict({**state, **dict.fromkeys(tied, *tables[:1])}, assign=True)

    def _tokenizer(self) -> Any:
        """The tokenizer as stored: AutoTokenizer of transformers 5 would change the id of unknown words."""
        from transformers import PreTrainedTokenizerFast

        file = self._part("tokenizer") / "tokenizer.json"
        read_json(file)
        tokenizer = _attempt(lambda: PreTrainedTokenizerFast(tokenizer_file=str(file), **_SPECIAL), file)
        vocabulary = tokenizer.get_vocab()
        lost = [token for token in _SPECIAL.values() if token not in vocabulary]
        if lost or tokenizer.convert_tokens_to_ids("<pad>") != 0:
            wrong = f"no {', '.join(lost)}" if lost else "<pad> is not token 0"
            raise WeightsError(f"{file} is no T5 tokenizer ({wrong}). {_FIX}")
        return tokenizer


def _check_statistics(config: Any, file: Path) -> None:
    """WeightsError unless each latent channel has a mean and a positive deviation, all finite."""
    for name in ("latents_mean", "latents_std"):
        values = getattr(config, name)
        right = isinstance(values, list | tuple) and len(values) == config.z_dim
        if not right or not all(math.isfinite(v) and (v > 0 or name == "latents_mean") for v in values):
            raise WeightsError(f"{file}: {name} is {values}; it must be {config.z_dim} numbers, finite. {_FIX}")


def _constructor_config(folder: Path, class_name: str) -> dict[str, Any]:
    """The constructor arguments in a part's config.json; a name unknown to diffusers' class is refused."""
    import diffusers

    config = read_json(folder / "config.json")
    written_for = config.get("_class_name", class_name)
    if written_for != class_name:
        raise WeightsError(f"{folder}/config.json is for {written_for}, not {class_name}. {_FIX}")
    known = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    endless = [key for key, value in kept.items() if isinstance(value, int) and value > _LARGEST.get(key, _LARGE)]
    if endless:
        raise WeightsError(f"{folder}/config.json: {endless[0]} is {kept[endless[0]]}, which no Wan has. {_FIX}")
    unknown = [key for key in kept if key not in known]
    if unknown:
        raise WeightsError(f"{folder}/config.json has {', '.join(unknown)}, unknown to {class_name}. {_FIX}")
    return kept


def _attempt(make: Callable[[], Any], where: Path) -> Any:
    """Build from a config that a person may have damaged: any error of a library becomes one line."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - libraries raise anything on a bad config
        raise WeightsError(f"{where} cannot be built: {' '.join(str(error).split())[:300]}. {_FIX}") from None


def _shapes_of(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}
