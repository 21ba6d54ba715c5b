"""The light mask decoder: a fraction of the work of the VAE's, causal like it, and identified by its weights."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from trials import SEED, TRIALS

from flowmask.models.config import LightDecoderConfig
from flowmask.models.decoders.either import decoder_of, empty_light, network_of, refuse_other_decoder
from flowmask.models.decoders.light import LightMaskDecoder
from flowmask.models.errors import WeightsError
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.trainer.objectives import section

DRAWS = 4 * TRIALS

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def networks() -> list[LightDecoderConfig]:
    """Random sizes, and the default one."""
    rng = random.Random(SEED)
    drawn = [LightDecoderConfig(width=rng.randint(1, 24), depth=rng.randint(0, 3)) for _ in range(DRAWS)]
    return [LightDecoderConfig(), *drawn]


def trained(network: LightDecoderConfig) -> LightMaskDecoder:
    """A decoder whose weights differ from its initial ones."""
    decoder = LightMaskDecoder.fresh(network)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def flop(decoder: torch.nn.Module, latent: tuple[int, int, int]) -> int:
    """FLOP by torch's counter; the module is on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(torch.empty(1, 16, *latent, device="meta"))
    return counter.get_total_flops()


def test_it_has_at_most_a_twentieth_of_the_work_of_the_published_vaes_decoder() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae = AutoencoderKLWan()  # as published, in all sizes of Wan2.1
    latent = (5, 60, 104)  # 17x480x832
    whole = flop(MaskDecoder.from_vae(vae), latent)
    assert whole == pytest.approx(58.6e12, rel=1e-2)
    config: Any = section(yaml.safe_load((CONFIGS / "train_light_mask_decoder.yaml").read_text())["objective"])
    for network in (LightDecoderConfig(), config.network):
        assert flop(empty_light(network), latent) <= whole / 20


@torch.no_grad()
@pytest.mark.parametrize("network", networks(), ids=str)
def test_the_frames_of_a_latent_frame_depend_on_it_and_on_none_that_is_later(network: LightDecoderConfig) -> None:
    decoder, latent = trained(network), torch.randn(2, 16, 4, 3, 5, generator=torch.Generator().manual_seed(SEED))
    logits = decoder(latent)
    assert logits.shape == (2, 1, 13, 24, 40) and logits.dtype == torch.float32
    for place in range(4):
        changed = latent.clone()
        changed[:, :, place] += 1
        moved = (decoder(changed) - logits).abs().amax((0, 1, 3, 4)) > 0
        first = 4 * place - 3 if place else 0
        assert not moved[:first].any() and moved[first : 4 * place + 1].all()
        assert torch.allclose(decoder(latent[:, :, : place + 1]), logits[:, :, : 4 * place + 1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("network", networks(), ids=str)
def test_a_piece_that_begins_as_far_back_as_the_convolutions_see_is_decoded_as_in_the_whole(
    network: LightDecoderConfig,
) -> None:
    decoder, back = trained(network), 2 + 4 * network.depth
    latent = torch.randn(1, 16, back + 4, 2, 3, generator=torch.Generator().manual_seed(SEED))
    whole, piece = decoder(latent), decoder(latent[:, :, 2:])
    assert torch.allclose(whole[:, :, -8:-4], piece[:, :, -8:-4], atol=1e-4)
    assert not torch.allclose(whole[:, :, 5:9], piece[:, :, 1:5], atol=1e-4), "nearer to its start it is not"


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_neighbours_or_on_an_earlier_call() -> None:
    decoder, latent = trained(LightDecoderConfig()), torch.randn(2, 16, 3, 4, 4)
    first = decoder(latent)
    assert torch.equal(decoder(latent), first)
    assert torch.allclose(decoder(latent[1:]), first[1:], atol=1e-4)


def test_gradients_reach_every_parameter_and_every_latent_frame() -> None:
    decoder = LightMaskDecoder.fresh(LightDecoderConfig())
    latent = torch.randn(2, 16, 3, 4, 4, requires_grad=True)
    decoder(latent).square().mean().backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without and latent.grad is not None and all(latent.grad[:, :, k].any() for k in range(3))
    decoder(torch.randn(1, 16, 1, 2, 2)).mean().backward()  # one frame: an image


def test_it_starts_near_zero_the_same_in_every_process_and_draws_from_no_others_generator() -> None:
    torch.manual_seed(7)
    before, one = torch.random.get_rng_state(), LightMaskDecoder.fresh(LightDecoderConfig())
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    other = LightMaskDecoder.fresh(LightDecoderConfig()).state_dict()
    assert all(torch.equal(other[name], value) for name, value in one.state_dict().items())
    assert one(3 * torch.randn(1, 16, 3, 8, 8)).abs().max() < 3


def test_what_was_trained_on_images_alone_decodes_each_latent_frame_of_a_video_from_itself() -> None:
    decoder = LightMaskDecoder.fresh(LightDecoderConfig(width=8, depth=2))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (decoder(torch.randn(2, 16, 1, 4, 4)) - 1).square().mean().backward()
        optimizer.step()
    latent = torch.randn(1, 16, 3, 4, 4)
    changed = torch.cat([-latent[:, :, :2], latent[:, :, 2:]], dim=2)
    with torch.no_grad():
        one, other = decoder(latent), decoder(changed)
    assert torch.equal(one[:, :, 5:], other[:, :, 5:]) and not torch.allclose(one[:, :, :5], other[:, :, :5])


@torch.no_grad()
@pytest.mark.parametrize("network", networks(), ids=str)
def test_its_weights_alone_tell_what_it_is(vae: Any, network: LightDecoderConfig) -> None:
    decoder, latent = trained(network), torch.randn(1, 16, 2, 2, 2)
    state = decoder.state_dict()
    assert network_of(state, where="x") == network
    again = decoder_of(state, vae, where="x")
    assert isinstance(again, LightMaskDecoder) and torch.equal(again(latent), decoder(latent))
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in again.parameters())
    for name in state:
        with pytest.raises(WeightsError, match=r"does not fit|is not a light mask decoder") as caught:
            decoder_of({**state, name: torch.zeros(2, 2)}, vae, where="x")
        assert "\n" not in str(caught.value)


def test_a_vaes_decoder_is_known_too_and_one_is_not_taken_for_the_other(vae: Any) -> None:
    own = MaskDecoder.from_vae(vae)
    assert isinstance(decoder_of(own.state_dict(), vae, where="x"), MaskDecoder)
    light, small = (LightMaskDecoder.fresh(LightDecoderConfig(width=width)) for width in (8, 4))
    for found, module, said in [
        (own, light, "a decoder of the VAE's shape, but a light decoder of width 8 .* objective.kind=mask_decoder"),
        (light, own, "width 8 and depth 1, but a decoder of the VAE's shape is trained; set objective.kind=light_"),
        (light, small, "width 8 .* but .* width 4 .* objective.network.width=8 objective.network.depth=1"),
    ]:
        refuse_other_decoder(found.state_dict(), found, where="x")
        with pytest.raises(WeightsError, match=said):
            refuse_other_decoder(found.state_dict(), module, where="x")
    with pytest.raises(WeightsError, match="does not fit the model"):
        decoder_of({"proj_out.bias": torch.ones(3)}, vae, where="x")


def test_a_file_cannot_ask_for_a_network_that_is_larger_than_any_config(vae: Any) -> None:
    for state in ({"stem.weight": torch.zeros(1025, 1)}, {"stem.weight": torch.tensor(1.0)}):
        with pytest.raises(WeightsError, match="x is not a light mask decoder"):
            decoder_of(state, vae, where="x")
