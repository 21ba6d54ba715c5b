"""A segmenter combines its parts: the mean of the posterior, the cleaned sentence, the sampler, the decoder."""

from pathlib import Path

import pytest
import torch

from flowmask.models.config import SamplerConfig
from flowmask.models.dit import build_dit
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.segment import (
    Segmenter,
    SegmentSettings,
    decoded_together,
    masks_at,
    resize_logits,
    sampled_together,
)
from flowmask.models.vae import denormalise, encode_moments, latent_frames, normalise
from flowmask.models.weights.wan import WanFolder

GOLDEN = Path(__file__).parents[1] / "golden" / "parity"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("wan")
    (root / "text_encoder").symlink_to(GOLDEN / "text" / "encoder")
    (root / "tokenizer").symlink_to(GOLDEN / "text" / "tokenizer")
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 48,
    }
    dit = build_dit(config, in_channels=32)
    state = {name: torch.randn(tensor.shape) * 0.1 for name, tensor in dit.state_dict().items()}
    dit.load_state_dict(state, assign=True)
    return {
        "dit": dit,
        "vae": vae,
        "text_encoder": WanFolder(root).text_encoder(torch.float32),
        "mask_decoder": MaskDecoder.from_vae(vae),
    }


def segmenter(parts: dict[str, object], *, steps: int = 1, **settings: object) -> Segmenter:
    chosen = SegmentSettings(sampler=SamplerConfig(steps=steps), text_tokens=32, **settings)
    others = {name: part for name, part in parts.items() if name != "dit"}
    return Segmenter(parts["dit"], **others, settings=chosen)


SIGNED = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_video_latent_is_the_normalised_posterior_mean(parts: dict[str, object]) -> None:
    ours = segmenter(parts)
    latent = ours.encode_video(latent_frames(SIGNED))
    assert torch.equal(latent, normalise(ours.stats, encode_moments(parts["vae"], SIGNED)[0]))
    assert torch.equal(latent, ours.encode_video(latent_frames(SIGNED)))


def test_text_is_padded_with_zeros_to_the_trained_length(parts: dict[str, object]) -> None:
    text = segmenter(parts).encode_text(" A  dog ")
    count = parts["text_encoder"].token_count("a dog")
    assert text.shape == (1, 32, 24) and not text[:, count:].any() and text[:, :count].any()


def test_lower_case_is_the_default_and_a_setting(parts: dict[str, object]) -> None:
    lower, kept = segmenter(parts), segmenter(parts, lowercase=False)
    assert torch.equal(lower.encode_text("The DOG"), lower.encode_text("the dog"))
    assert not torch.equal(kept.encode_text("The DOG"), kept.encode_text("the dog"))


def test_a_normalised_mask_latent_is_denormalised_before_decoding(parts: dict[str, object]) -> None:
    plain, video = segmenter(parts), segmenter(parts, mask_latent_norm="video")
    latent, text = plain.encode_video(latent_frames(SIGNED)), plain.encode_text("a dog")
    sampled = plain.mask_latent(latent, text)
    assert torch.equal(video.mask_latent(latent, text), denormalise(plain.stats, sampled))


def test_logits_depend_on_the_sentence_and_the_steps(parts: dict[str, object]) -> None:
    one, four = segmenter(parts), segmenter(parts, steps=4)
    latent = one.encode_video(latent_frames(SIGNED))
    logits = one.logits(latent, "the dog")
    assert logits.shape == (5, 32, 48) and logits.dtype == torch.float32 and not logits.requires_grad
    assert torch.equal(logits, one.logits(latent, "the dog"))
    assert not torch.equal(logits, one.logits(latent, "two birds"))
    assert not torch.equal(logits, four.logits(latent, "the dog"))


def test_sentences_in_one_batch_give_what_each_gives_alone(parts: dict[str, object]) -> None:
    ours = segmenter(parts)
    latent = ours.encode_video(latent_frames(SIGNED))
    texts = [ours.encode_text(sentence) for sentence in ("the dog", "two birds")]
    together = ours.mask_latent(latent.expand(2, -1, -1, -1, -1), torch.cat(texts))
    for place, text in enumerate(texts):
        assert torch.allclose(together[place : place + 1], ours.mask_latent(latent, text), atol=1e-5)


def test_masks_are_logits_above_zero_without_the_padding_frames() -> None:
    logits = torch.randn(5, 32, 48)
    masks = masks_at(logits, frames=3, size=(48, 32))
    assert masks.dtype == torch.bool and torch.equal(masks, logits[:3] > 0)
    assert masks_at(logits, frames=5, size=(70, 50)).shape == (5, 50, 70)


def test_logits_are_clamped_before_they_are_resized() -> None:
    logits = torch.full((1, 2, 2), -0.9)
    logits[0, 0, 0] = 1e6
    resized = resize_logits(logits, size=(8, 8))
    assert resized.abs().max() <= 1 and resized.shape == (1, 8, 8)
    assert not masks_at(logits, frames=1, size=(8, 8))[0, 4:, 4:].any()


def test_what_goes_through_a_model_together_takes_no_more_than_one_sentence_of_a_full_clip() -> None:
    full, text = (5, 60, 104), 256
    assert sampled_together(full, text_tokens=text) == decoded_together(full) == 1
    assert sampled_together((60, 60, 104), text_tokens=text) == decoded_together((5, 120, 208)) == 1
    tokens, pixels = 5 * 30 * 52 + text, 480 * 832
    for f, h, w in ((1, 2, 2), (3, 16, 16), (5, 32, 32), (21, 30, 52)):
        together = sampled_together((f, h, w), text_tokens=text)
        assert together > 1 or f * h * w // 4 > tokens / 2
        assert together == 1 or together * (f * h * w // 4 + text) <= 1.02 * tokens
        assert decoded_together((f, h, w)) * 64 * h * w <= pixels
