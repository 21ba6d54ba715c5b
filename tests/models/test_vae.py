"""Video latents are normalised and mask latents are not; the encoder gets inputs as in the legend."""

import copy
from collections.abc import Iterator

import pytest
import torch
from trials import SEED

from flowmask.models.cost.live_memory import LiveMemory
from flowmask.models.vae import (
    LatentStats,
    denormalise,
    encode_mask,
    encode_moments,
    encode_pieces,
    latent_frames,
    mask_to_signed,
    normalise,
)


@pytest.fixture(scope="module")
def vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def test_normalise_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel() -> None:
    stats = LatentStats.from_lists(range(16), range(1, 17))
    raw = torch.randn(2, 16, 3, 4, 6)
    want = torch.stack([(raw[:, c] - c) / (c + 1) for c in range(16)], dim=1)
    assert torch.allclose(normalise(stats, raw), want)
    assert torch.allclose(denormalise(stats, normalise(stats, raw)), raw, atol=1e-5)
    assert normalise(stats, raw.bfloat16()).dtype == torch.float32


def test_statistics_come_from_the_vae_config_or_from_plain_lists(vae: torch.nn.Module) -> None:
    assert LatentStats.of(vae) == LatentStats.from_lists(vae.config.latents_mean, vae.config.latents_std)
    assert len(LatentStats.of(vae).mean) == 16


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (9, 3)])
def test_moments_have_the_latent_grid_and_a_clamped_logvar(
    vae: torch.nn.Module, frames: int, latent_frames: int
) -> None:
    mean, logvar = encode_moments(vae, torch.rand(2, 3, frames, 32, 48) * 2 - 1)
    assert mean.shape == logvar.shape == (2, 16, latent_frames, 4, 6)
    assert mean.dtype == torch.float32 and not mean.requires_grad
    assert logvar.min() >= -30 and logvar.max() <= 20


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 81])
def test_a_clip_that_comes_in_pieces_has_the_latent_of_the_whole_to_the_bit(
    vae: torch.nn.Module, frames: int, dtype: torch.dtype
) -> None:
    vae = copy.deepcopy(vae).to(dtype)
    generator = torch.Generator().manual_seed(SEED + frames)
    for batch in (1, 2):
        drawn = torch.rand(batch, frames, 16, 24, 3, generator=generator).permute(0, 4, 1, 2, 3) * 2 - 1
        for signed in (drawn, drawn.contiguous()):  # both memory layouts: as in cache builds, and as in videos
            whole = vae.encode(signed.to(dtype)).latent_dist
            pieces = (piece.contiguous() if signed.is_contiguous() else piece for piece in latent_frames(signed))
            mean, logvar = encode_pieces(vae, pieces)
            assert torch.equal(mean, whole.mean.float()) and torch.equal(logvar, whole.logvar.float())


@torch.no_grad()
def test_of_a_clip_that_comes_in_pieces_no_more_pixels_are_held_than_those_of_two(vae: torch.nn.Module) -> None:
    def pieces(count: int) -> Iterator[torch.Tensor]:
        for number in range(count):
            yield torch.rand(1, 3, 4 if number else 1, 64, 64)

    def most(count: int) -> int:
        with LiveMemory() as memory:
            encode_pieces(vae, pieces(count))
        return memory.peak_bytes

    one, latent = 4 * 3 * 4 * 64 * 64, 4 * 32 * 8 * 8
    assert most(24) < most(4) + 20 * 2 * latent + one, "it grows with the latents alone"


def test_a_clip_of_another_length_is_a_bug_of_the_caller(vae: torch.nn.Module) -> None:
    with pytest.raises(AssertionError, match="4k\\+1"):
        encode_moments(vae, torch.zeros(1, 3, 4, 32, 32))


def test_a_mask_is_encoded_as_a_black_and_white_video_by_its_mean(vae: torch.nn.Module) -> None:
    mask = torch.rand(2, 5, 32, 48) > 0.5
    signed = mask_to_signed(mask)
    assert signed.shape == (2, 3, 5, 32, 48)
    for channel in range(3):
        assert torch.equal(signed[:, channel], torch.where(mask, 1.0, -1.0))
    assert torch.equal(encode_mask(vae, mask), encode_moments(vae, signed)[0])
