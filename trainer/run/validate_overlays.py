"""Overlay videos of an evaluation during training: prediction and truth side by side.

A cache holds no pixels, so the clip is decoded from its latent: this is the model's input.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.clip.pixels import from_signed
from flowmask.data_pipeline.read.mixture import MixtureReader
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.show.paint import PREDICTED_COLOUR, TRUE_COLOUR
from flowmask.models.errors import DataError
from flowmask.models.vae import decode
from flowmask.trainer import distributed
from flowmask.trainer.predict.show.overlay import OverlayVideo, legend_text

_FPS = 8.0


class ClipOverlays:
    """Draws examples of a cache, with the VAE that they were encoded with.

    say: receives the message about a picture that can't be written; the training continues without it
    """

    def __init__(self, reader: CacheReader | MixtureReader, vae: Any, *, say: Callable[[str], None]) -> None:
        self._reader, self._vae, self._say = reader, vae.eval().requires_grad_(False), say

    def write(self, folder: Path, example_id: int, *, predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> None:
        """Write folder/example_<id>.mp4. predicted, truth: bool [F H W]."""
        parts = self._reader.read(np.array([example_id]), needs={"video_mean"}, text_tokens=0)
        vae = self._vae.to(distributed.device())
        signed = decode(vae, parts["video_mean"])[0]
        vae.to("cpu")
        frames = from_signed(signed, pixel_norm=self._reader.manifest.pixel_norm)
        height, width = truth.shape[1:]
        sentence = legend_text(self._reader.sentence(example_id), instead=f"the sentence of example {example_id}")
        prompts = [(f"predicted: {sentence}", PREDICTED_COLOUR), ("truth, on the right", TRUE_COLOUR)]
        path, nothing = folder / f"example_{example_id}.mp4", np.zeros((height, width), np.bool_)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with OverlayVideo(path, prompts=prompts, height=height, width=2 * width, fps=_FPS) as overlay:
                for frame, left, right in zip(frames[: len(truth)], predicted, truth, strict=True):
                    masks = [np.hstack([left, nothing]), np.hstack([nothing, right])]
                    overlay.add(np.hstack([frame, frame]), masks)
        except (OSError, DataError) as error:
            self._say(f"{path} could not be written: {error}")
