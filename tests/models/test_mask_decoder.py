"""The mask decoder decodes as the VAE does, without its clamp, and every frame gives gradients."""

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from flowmask.models.config import Recompute
from flowmask.models.cost.dry_run import measure_pass
from flowmask.models.errors import WeightsError
from flowmask.models.mask_decoder import MaskDecoder, dice_loss, focal_loss

RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)


@pytest.fixture(scope="module")
def vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 2  # so that some outputs exceed the clamp
    return vae


@torch.no_grad()
def test_at_the_start_it_is_the_mean_of_the_vaes_own_channels(vae: torch.nn.Module) -> None:
    latent = torch.randn(2, 16, 3, 4, 6) * 0.05
    decoded = vae.decode(latent).sample
    seen = decoded.abs().amax(1, keepdim=True) < 1  # where the VAE's clamp changes nothing
    ours = MaskDecoder.from_vae(vae)(latent)
    assert seen.float().mean() > 0.1
    assert torch.allclose(ours[seen], decoded.mean(1, keepdim=True)[seen], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 81])
def test_within_the_clamp_it_is_the_vaes_own_decode_with_that_last_layer_to_the_bit(
    vae: torch.nn.Module, frames: int, dtype: torch.dtype
) -> None:
    ours = MaskDecoder.from_vae(vae).to(dtype)
    theirs = copy.deepcopy(vae).to(dtype)
    theirs.decoder.conv_out = ours.decoder.conv_out
    for batch in (1, 2):
        latent = torch.randn(batch, 16, 1 + frames // 4, 2, 3, generator=torch.Generator().manual_seed(frames))
        whole = theirs.decode(latent.to(dtype)).sample
        assert torch.equal(ours(latent).clamp(-1, 1), whole.float()) and whole.shape[2] == frames


@torch.no_grad()
def test_logits_pass_the_bounds_that_the_vae_clamps_to(vae: torch.nn.Module) -> None:
    decoder = MaskDecoder.from_vae(vae)
    decoder.decoder.conv_out.weight.mul_(20)
    logits = decoder(torch.randn(1, 16, 2, 4, 4))
    assert logits.shape == (1, 1, 5, 32, 32) and logits.abs().max() > 1


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_neighbours_or_on_an_earlier_call(vae: torch.nn.Module) -> None:
    decoder, latent = MaskDecoder.from_vae(vae), torch.randn(2, 16, 3, 4, 4)
    first = decoder(latent)
    assert torch.equal(decoder(latent), first)
    assert torch.allclose(decoder(latent[1:]), first[1:], atol=1e-5)


@torch.no_grad()
def test_decoding_is_causal(vae: torch.nn.Module) -> None:
    decoder, latent = MaskDecoder.from_vae(vae), torch.randn(1, 16, 3, 4, 4)
    changed = torch.cat([latent[:, :, :2], -latent[:, :, 2:]], dim=2)
    first, second = decoder(latent), decoder(changed)
    assert torch.equal(first[:, :, :5], second[:, :, :5]) and not torch.allclose(first, second)


def test_gradients_reach_every_parameter_and_every_latent_frame(vae: torch.nn.Module) -> None:
    decoder = MaskDecoder.from_vae(vae)
    latent = torch.randn(2, 16, 3, 4, 4, requires_grad=True)
    decoder(latent)[:, :, -1].square().mean().backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without and all(latent.grad[:, :, k].any() for k in range(3))


def test_training_it_leaves_the_vae_alone(vae: torch.nn.Module) -> None:
    decoder, before = MaskDecoder.from_vae(vae), vae.decoder.conv_in.weight.clone()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    assert torch.equal(vae.decoder.conv_in.weight, before) and vae.decoder.conv_out.weight.shape[0] == 3
    assert {name.split(".")[0] for name in decoder.state_dict()} == {"decoder", "post_quant_conv"}


def test_weights_load_strictly(vae: torch.nn.Module) -> None:
    decoder = MaskDecoder.from_vae(vae)
    state = {name: tensor + 1 for name, tensor in decoder.state_dict().items()}
    loaded = MaskDecoder.from_vae(vae).load(state, where="x").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    state.pop("post_quant_conv.bias")
    with pytest.raises(WeightsError, match=r"1 missing \(post_quant_conv\.bias\)"):
        decoder.load(state, where="decoder.pth")


def test_focal_loss_with_no_focus_and_even_balance_is_half_the_cross_entropy() -> None:
    logits, target = torch.randn(2, 1, 3, 4, 4), torch.rand(2, 1, 3, 4, 4) > 0.5
    want = 0.5 * F.binary_cross_entropy_with_logits(logits, target.float())
    assert torch.allclose(focal_loss(logits, target, alpha=0.5, gamma=0.0), want)


def test_focal_loss_forgets_pixels_that_are_right() -> None:
    target = torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)
    sure, unsure = (focal_loss(torch.full_like(target, v, dtype=torch.float32), target) for v in (4.0, 0.0))
    expected = 0.25 * 0.25 * torch.log(torch.tensor(2.0))
    assert torch.allclose(unsure, expected) and sure < unsure / 1000


def test_dice_loss_is_zero_for_a_perfect_mask_and_near_one_for_a_disjoint_one() -> None:
    target = torch.zeros(1, 1, 2, 8, 8, dtype=torch.bool)
    target[..., :4] = True
    logits = torch.where(target, 50.0, -50.0)
    assert dice_loss(logits, target) < 1e-6 and dice_loss(-logits, target) > 0.99
    assert dice_loss(-torch.full_like(logits, 50.0), torch.zeros_like(target)) < 1e-6


def test_losses_are_finite_for_extreme_logits() -> None:
    logits = torch.tensor([-1e4, 1e4, 0.0]).view(1, 1, 3, 1, 1).requires_grad_()
    target = torch.tensor([True, False, True]).view(1, 1, 3, 1, 1)
    (focal_loss(logits, target) + dice_loss(logits, target)).backward()
    assert logits.grad.isfinite().all()


def trained_once(decoder: MaskDecoder, latent: torch.Tensor) -> list[torch.Tensor]:
    """Loss, and the gradients of every parameter and of the latent."""
    latent = latent.clone().requires_grad_()
    logits = decoder(latent)
    target = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    loss = 8 * focal_loss(logits, target) + 4 * dice_loss(logits, target)
    loss.backward()
    of_weights = [p.grad for p in decoder.parameters() if p.grad is not None]  # one frame gives none over time
    return [loss.detach(), latent.grad, *of_weights]


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("shape", [(2, 16, 3, 4, 6), (1, 16, 1, 6, 4), (1, 16, 5, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit_of_loss_and_gradients(
    vae: torch.nn.Module, dtype: torch.dtype, shape: tuple[int, ...], kind: Recompute
) -> None:
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    plain, saving = MaskDecoder.from_vae(vae).to(dtype), MaskDecoder.from_vae(vae).to(dtype)
    saving.recompute(kind)
    for one, other in zip(trained_once(plain, latent), trained_once(saving, latent), strict=True):
        assert torch.equal(one, other)


def test_the_fuller_recomputation_is_the_less_stays_alive(vae: torch.nn.Module) -> None:
    passes = {}
    for kind in RECOMPUTE:
        decoder = MaskDecoder.from_vae(vae)
        decoder.recompute(kind)
        passes[kind] = measure_pass(decoder, lambda module: module(torch.randn(1, 16, 5, 8, 8)).square().mean())
    none, selective, full = (passes[kind] for kind in RECOMPUTE)
    assert selective.peak_bytes < 0.65 * none.peak_bytes and full.peak_bytes < 0.75 * selective.peak_bytes
    assert selective.flop == none.flop < full.flop < 1.6 * none.flop


def test_a_decoder_that_recomputes_has_the_same_weights_and_decodes_without_gradients(vae: torch.nn.Module) -> None:
    plain, saving = MaskDecoder.from_vae(vae), MaskDecoder.from_vae(vae)
    saving.recompute("full")
    latent = torch.randn(1, 16, 3, 4, 4)
    assert plain.state_dict().keys() == saving.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain(latent), saving(latent))
