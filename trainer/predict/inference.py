"""A checkpoint as a segmenter: trained weights of any kind joined with the frozen parts.

Converts logits to masks of the video's own size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowmask.data_pipeline.clip.pixels import PixelNorm, pad_to_stride
from flowmask.data_pipeline.clip.vae_clip import FRAMES_AT_ONCE, VaeClip, chunks
from flowmask.data_pipeline.config import FrameBox
from flowmask.models.config import AskedConventions, Attention, Precision, SamplerConfig, refuse_attention_in_fp32
from flowmask.models.decoders.either import decoder_of
from flowmask.models.device import rank_device, use_tf32
from flowmask.models.dit import require_attention, use_attention
from flowmask.models.errors import CheckpointError, ConfigError
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.segment import Segmenter, decoded_together, masks_at, sampled_together
from flowmask.models.strict import assign_strict, load_strict
from flowmask.models.text import RecentTexts
from flowmask.models.vae import encode_mask
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.conventions import conventions_in, segment_settings, settle
from flowmask.trainer.predict.parts import video_injected
from flowmask.trainer.predict.presence import Presence, presence_in
from flowmask.trainer.predict.weights import LoadedWeights, load_dit, load_mask_decoder, own_encoder
from flowmask.trainer.state.checkpoint import read_state
from flowmask.trainer.state.steps import newest

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

MaskPiece = tuple[Sequence[int], NDArray[np.bool_]]  # indices in the clip, bool [n H0 W0]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PRECISIONS: dict[str, Precision] = {"bfloat16": "bf16", "float32": "fp32"}  # by the names in caches
_SIDES = {"short_side": "height_px", "long_side": "width_px"}


def finite(logits: Tensor) -> Tensor:
    """The same logits [...]; CheckpointError if one is not finite: compared with 0 it would look like an empty mask.

    Waits for all earlier work of the device, so it is called when masks go to the host, not when models run.
    """
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            "the weights give logits that are not finite; use an earlier checkpoint, or precision=fp32"
        )
    return logits


def masks_of(logits: Tensor, clip: VaeClip, *, threshold: float = 0.5) -> Iterator[MaskPiece]:
    """Logits [F H W] of a clip to masks at the video's own size, without the padding frames; threshold: `masks_at`."""
    for places in chunks(range(clip.frames), FRAMES_AT_ONCE):
        some = logits[places[0] : places[-1] + 1]
        yield places, masks_at(some, frames=len(places), size=clip.original, threshold=threshold).cpu().numpy()


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmenter with the identity of its weights.

    box:       the frame box of the training's clips, if the weights record it, else that of the published ones
    box_known: whether the weights record it
    weights:   SHA-256 of the DiT's and the mask decoder's
    wan_files: names, sizes and times in the Wan folder, to detect a change without reading 11 GB
    presence:  the threshold stored in an export
    assumed:   conventions that neither the weights nor the user gave
    """

    segmenter: Segmenter
    pixel_norm: PixelNorm
    box: FrameBox
    weights: dict[str, str]
    wan_files: str
    presence: Presence | None = None
    assumed: Mapping[str, Any] = field(default_factory=dict)
    box_known: bool = False

    def unlike_training(self, box: FrameBox) -> str:
        """One line if the training's clips are known to have another size than frames in this box, else ''."""
        asked, trained = (f"{one.height_px}x{one.width_px}" for one in (box, self.box))
        differ = self.box_known and asked != trained
        return f"frames are resized into {asked} px, but in training they were resized into {trained}" if differ else ""

    @property
    def conventions(self) -> dict[str, str | int | bool]:
        """The four of `AskedConventions` in use."""
        return conventions_in(self.segmenter.settings, pixel_norm=self.pixel_norm)

    def encode(self, clip: VaeClip) -> Tensor:
        """Video latent [1 16 f h w] norm."""
        return self.segmenter.encode_video(clip.pieces())

    def logits(self, video_latent: Tensor, sentences: Sequence[str]) -> Iterator[Tensor]:
        """Logits [F H W] of each sentence, padding frames too.

        They go through the DiT and the decoder in batches whose size depends on the clip. This waits for no GPU, so
        the caller checks that they are finite, by `finite`.
        """
        _, _, *size = video_latent.shape
        shape = (size[0], size[1], size[2])
        for some in chunks(sentences, sampled_together(shape, text_tokens=self.segmenter.settings.text_tokens)):
            text = torch.cat([self.segmenter.encode_text(sentence) for sentence in some])
            latents = self.segmenter.mask_latent(video_latent.expand(len(some), -1, -1, -1, -1), text)
            for few in latents.split(decoded_together(shape)):
                yield from self._decoded(few)

    def round_trip(self, masks: NDArray[np.bool_]) -> Tensor:
        """Masks bool [F H W] of a clip's size -> logits [4k+1 H W]: only through the VAE and the decoder."""
        padded = pad_to_stride(torch.from_numpy(masks), dim=0)
        vae = self.segmenter.vae
        with torch.no_grad():
            return finite(self._decoded(encode_mask(vae, padded[None].to(vae.device)))[0])

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        """Mask latents [B 16 f h w] raw -> logits [B F H W]."""
        where = next(self.segmenter.mask_decoder.parameters()).device
        logits: Tensor = self.segmenter.mask_decoder(latents.to(where))[:, 0]
        return logits


def load_segmenter(
    checkpoint: str,
    *,
    mask_decoder: str | None = None,
    wan: Path | None = None,
    ema: bool = True,
    sampler: SamplerConfig,
    precision: Precision = "bf16",
    attention: Attention = "native",
    encoder_precision: Precision | None = None,
    decoder_precision: Precision = "fp32",
    tf32: bool | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    conventions: AskedConventions | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LoadedSegmenter:
    """Everything that turns a video and a sentence into masks, with the conventions of the training.

    checkpoint:   run folder, export or FlowRVS .pth
    mask_decoder: decoder run, FlowRVS .pth or 'vae'; None: the one in the config of the checkpoint's run
    wan:          Wan2.1 folder; None: the one that the checkpoint's run was trained from
    precision:    of the DiT
    attention:    attention kernel of the DiT
    encoder_precision: of the encoders of text and video; None: as for the training's cache
    decoder_precision: of the mask decoder
    conventions:  requested conventions that the weights do not record
    say:          receives messages: assumed conventions, encoders with another precision than in training
    Raises UserError if something is missing, moved or of another architecture.
    """
    where = rank_device(device)
    _require(attention, precision, device=where)
    use_tf32(tf32)
    dtype = DTYPES[precision]
    dit_weights = load_dit(checkpoint, ema=ema, wan=wan)
    settled = settle(dit_weights.settings, conventions or AskedConventions(), where=checkpoint)
    settings = settled.settings
    folder = WanFolder(wan_path(wan, settings, checkpoint))
    dit: Any = folder.empty_transformer(video_injection=video_injected(dit_weights.state_dict))
    state = {name: tensor.to(dtype) for name, tensor in dit_weights.state_dict.items()}
    assign_strict(dit, state, where=checkpoint, fix="Give the model.wan that it was trained from")
    use_attention(dit, attention, key="attention")
    vae: Any = folder.vae()
    named = mask_decoder or settings.get("mask_decoder") or "vae"
    decoder, decoder_sha256 = mask_decoder_named(named, vae, ema=ema, asked=mask_decoder is not None)
    encoders = EncoderPrecision.of(settings, asked=encoder_precision, otherwise=precision)
    for line in filter(None, (_last_only(dit_weights), settled.said(), encoders.differs)):
        say(f"{checkpoint}: {line}")
    sides = {**trained_sides(Path(checkpoint)), **settings}
    # diffusers' own method warns about parts to keep in fp32, but there are none
    nn.Module.to(vae, DTYPES[encoders.video])
    text_encoder = folder.text_encoder(DTYPES[encoders.text])
    text_encoder.model.to(where)
    segmenter = Segmenter(
        dit.to(where),
        vae=vae.to(where),
        text_encoder=RecentTexts(text_encoder),
        mask_decoder=decoder.to(where, DTYPES[decoder_precision]),
        settings=segment_settings(settings, sampler=sampler),
    )
    return LoadedSegmenter(
        segmenter,
        pixel_norm=settings["pixel_norm"],
        box=box_of(sides),
        box_known=any(sides.get(side) is not None for side in _SIDES),
        weights={"dit": dit_weights.sha256, "mask_decoder": decoder_sha256},
        wan_files=folder_state(folder.path),
        presence=presence_in(settings, where=checkpoint),
        assumed=settled.assumed,
    )


def _require(attention: Attention, precision: Precision, *, device: torch.device) -> None:
    """ConfigError if the kernels of the DiT can't run here."""
    try:
        refuse_attention_in_fp32(attention, precision)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    require_attention(attention, key="attention", device=device)


def _last_only(weights: LoadedWeights) -> str:
    return "it has no averaged weights, so the last ones are used (--no-ema, ema=false)" if weights.last_only else ""


@dataclass(frozen=True)
class EncoderPrecision:
    """Precision of the encoders of text and video; differs: why it may differ from the training's."""

    text: Precision
    video: Precision
    differs: str = ""

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, asked: Precision | None, otherwise: Precision) -> "EncoderPrecision":
        """That of the cache that weights of these settings were trained on, unless another one is requested.

        otherwise: of text, if the training's is unknown; video is then encoded in fp32.
        """
        trained = _PRECISIONS.get(str(settings.get("encoder_dtype")))
        used = asked or trained
        if used is None:
            said = (
                f"the precision of the text and video encoders in its training is unknown; using {otherwise} and fp32"
            )
            return cls(otherwise, "fp32", f"{said}; to change it: encoder_precision=fp32 or bf16")
        said = f"text and video are encoded in {used}, but in training they were encoded in {trained}"
        return cls(used, used, said if trained not in (None, used) else "")


def wan_path(asked: Path | None, settings: Mapping[str, Any], checkpoint: str) -> Path:
    """The requested Wan folder, or the recorded one if it still exists."""
    if asked is not None:
        return asked
    known = settings.get("wan")
    if known is None:
        raise CheckpointError(f"{checkpoint} does not name its Wan2.1 folder; give model.wan (--wan)")
    if not Path(known).is_dir():
        raise CheckpointError(f"{checkpoint} was trained from {known}, which does not exist; give model.wan (--wan)")
    return Path(known)


def box_of(told: Mapping[str, Any]) -> FrameBox:
    """Short and long side of the training as height and width, as the reference pairs 480x832 with them."""
    sides = {name: told.get(side) for side, name in _SIDES.items()}
    return FrameBox(**{name: side for name, side in sides.items() if side is not None})


def trained_sides(path: Path) -> dict[str, Any]:
    """Short and long side in px of a run's training clips; empty for weights that are not from a run."""
    checkpoint = newest(path)
    if checkpoint is None:
        return {}
    return sides_in(read_state(checkpoint)["state"].get("fingerprint", {}).get("fields", {}))


def sides_in(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Short and long side in px by the fields of a cache's fingerprint, if it has them."""
    sides = {name: fields.get(f"clip.{name}") for name in _SIDES}
    return {name: value for name, value in sides.items() if value is not None}


def mask_decoder_named(
    named: str, vae: "AutoencoderKLWan", *, ema: bool = True, asked: bool = True
) -> tuple[nn.Module, str]:
    """The decoder, of either kind, and its hash. An encoder stored with it (`own_encoder`) replaces the VAE's."""
    if named == "vae":
        return MaskDecoder.from_vae(vae), "vae"
    if not asked and not Path(named).exists():
        raise CheckpointError(
            f"the run names the mask decoder {named}, which does not exist; give mask_decoder (--mask-decoder)"
        )
    weights = load_mask_decoder(named, ema=ema)
    if encoder := own_encoder(named):
        kept = {key: value for key, value in vae.state_dict().items() if key not in encoder}
        load_strict(vae, {**kept, **encoder}, where=named, fix="Use a decoder of the same VAE")
    return decoder_of(weights.state_dict, vae, where=named), weights.sha256


def folder_state(folder: Path) -> str:
    """Names, sizes and times of all files, to detect a change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return ";".join(f"{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
