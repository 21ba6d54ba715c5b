"""Sentences are answered without reading from the device: on a GPU, the host waits for each number that it reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counters import Operators
from golden_export import write_golden_export
from host_waits import Questions
from PIL import Image
from torch import Tensor

from flowmask.data_pipeline.clip.vae_clip import VaeClip
from flowmask.models.config import SamplerConfig
from flowmask.models.errors import CheckpointError
from flowmask.models.segment import Segmenter
from flowmask.trainer.predict import one_video
from flowmask.trainer.predict.inference import load_segmenter
from flowmask.trainer.predict.predict import predict
from flowmask.trainer.predict.windows.clips import Stitched
from flowmask.trainer.predict.windows.cut import WindowConfig, cut

SENTENCES = ["a dog", "two birds on the left"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_golden_export(tmp_path_factory.mktemp("golden"))


def test_a_window_and_its_sentences_are_answered_without_a_question_and_without_a_copy_that_is_waited_for(
    golden: Path,
) -> None:
    """The meta device stands for a GPU: it holds no numbers, so code that asks for one fails there."""
    settings: dict[str, Any] = {"precision": "fp32", "encoder_precision": "bf16", "device": "cpu"}
    whole = load_segmenter(str(golden), sampler=SamplerConfig(steps=2), **settings)
    segmenter: Any = whole.segmenter
    object.__setattr__(segmenter.settings, "start", "noise")
    for model in (segmenter.dit, segmenter.vae, segmenter.mask_decoder, segmenter.text_encoder.encoder.model):
        model.to("meta")
    clip = VaeClip(np.zeros((5, 32, 48, 3), np.uint8), 5, (48, 32), (60, 40), "half")
    with Operators() as operators, Questions() as questions:
        found = list(whole.logits(whole.encode(clip), SENTENCES))
    assert [logits.shape for logits in found] == [(5, 32, 48)] * len(SENTENCES)
    assert operators.sent_bytes > clip.rgb8.size * 4 and operators.waited_copies == 0
    assert not questions.seen["tensor on a device"]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("frame", [0, 6, 12])
def test_a_logit_that_is_not_finite_is_found_where_its_frame_is_final(broken: float, frame: int) -> None:
    windows, answer = cut(13, WindowConfig(frames=9, overlap=4)), Stitched()
    with pytest.raises(CheckpointError, match="logits that are not finite; use an earlier checkpoint"):
        for window in windows:
            logits = torch.zeros(len(window.frames), 2, 2)
            if frame in window.frames:
                logits[window.frames.index(frame), 1, 1] = broken
            answer.add(window, logits)
            assert frame >= window.final.stop


def test_the_next_sentence_is_queued_while_the_masks_of_the_one_before_are_written(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If masks were written first, the second sentence would never come, since the writer waits for it."""
    import threading

    told, sentences, write, asked = threading.Event(), list[str](), one_video.write_mask, Segmenter.encode_text

    def encode_text(self: Segmenter, sentence: str) -> Tensor:
        sentences.append(sentence)
        if len(sentences) == 2:
            told.set()
        return asked(self, sentence)

    def write_mask(*given: Any) -> None:
        assert told.wait(60), "the second sentence waits for the masks of the first"
        write(*given)

    monkeypatch.setattr(Segmenter, "encode_text", encode_text)
    monkeypatch.setattr(one_video, "write_mask", write_mask)
    (tmp_path / "v").mkdir()
    for i in range(5):
        Image.fromarray(np.full((32, 48, 3), 40 * i, np.uint8)).save(tmp_path / "v" / f"{i}.png")
    predict(tmp_path / "v", SENTENCES, checkpoint=str(golden), out=tmp_path / "p", precision="fp32", device="cpu")
    assert sentences == SENTENCES
