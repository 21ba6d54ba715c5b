"""The encoder of the tiny VAE in closed form: principal components of 8x8 pixel blocks, written into Wan's network.

The shortcuts of a small `AutoencoderKLWan` can hold an exactly linear map. The best linear map to 16 channels needs
no training: each strided convolution takes the principal components of its inputs. Residual branches are zero.
One nonlinearity remains: norm and SiLU before the last convolution. A large constant channel cancels the norm, which
then divides by a constant. Pairs of channels cancel SiLU, since SiLU(y) - SiLU(-y) = y.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Z = 16  # latent channels
PIXEL, HALF, QUARTER, EIGHTH = 8, 8, 16, 32  # channels at each resolution: base_dim 8, dim_mult 1, 2, 4
KEPT_QUARTER, KEPT_EIGHTH = (12, 18)  # channels for the mean of two frames; the others hold their difference
CONSTANT = 1024.0  # value of the channel that dominates the norm; the map is linear up to |x|^2 / 2 CONSTANT^2
POSTERIOR_STD = 0.05  # for a latent with standard deviation 1


@dataclass(frozen=True)
class LinearEncoder:
    """Matrices [out in] of each merge, finest first; `scale` [16] gives each latent channel its standard deviation."""

    half: Tensor  # 8 x (3 channels, 2x2 pixels)
    quarter: Tensor  # 16 x (8, 2x2)
    quarter_time: Tensor  # 16 x (two frames, 16)
    eighth: Tensor  # 32 x (16, 2x2)
    eighth_time: Tensor  # 32 x (two frames, 32)
    latent: Tensor  # 16 x 32
    scale: Tensor

    def __call__(self, signed: Tensor) -> Tensor:
        """Clips [B 3 F H W] signed, F = 4k+1, to latents [B 16 f h w] raw."""
        first, rest = self._space(signed[:, :, :1]), signed[:, :, 1:]
        latents = [_mix(self.latent, first)]
        if rest.shape[2]:
            quarter = _mix(self.quarter_time, _pairs(self._quarter(rest)))
            eighth = _mix(self.eighth, _blocks(quarter))
            latents.append(_mix(self.latent, _mix(self.eighth_time, _pairs(eighth))))
        return torch.cat(latents, 2) * self.scale.view(1, -1, 1, 1, 1)

    def _quarter(self, signed: Tensor) -> Tensor:
        return _mix(self.quarter, _blocks(_mix(self.half, _blocks(signed))))

    def _space(self, signed: Tensor) -> Tensor:
        return _mix(self.eighth, _blocks(self._quarter(signed)))


def fit(clips: Tensor, *, raw_std: float) -> LinearEncoder:
    """Fit to clips [B 3 5 H W] signed, half of them masks as grey videos; each channel gets the std `raw_std`."""
    pixels = _blocks(clips)
    half = _components(pixels, HALF)
    blocks = _blocks(_mix(half, pixels))
    quarter = _components(blocks, QUARTER)
    frames = _mix(quarter, blocks)
    quarter_time = _merge(QUARTER, KEPT_QUARTER)
    first, rest = _blocks(frames[:, :, :1]), _blocks(_mix(quarter_time, _pairs(frames[:, :, 1:])))
    eighth = _components(torch.cat([first, rest], 2), EIGHTH)
    eighth_time = _merge(EIGHTH, KEPT_EIGHTH)
    wide = torch.cat([_mix(eighth, first), _mix(eighth_time, _pairs(_mix(eighth, rest)))], 2)
    latent = _components(wide, Z)
    scale = raw_std / _mix(latent, wide).transpose(0, 1).flatten(1).std(1)
    return LinearEncoder(half, quarter, quarter_time, eighth, eighth_time, latent, scale)


@torch.no_grad()
def write(linear: LinearEncoder, vae: Any) -> None:
    """Make the encoder of an AutoencoderKLWan compute `linear`, in place.

    Fits base_dim 8 and dim_mult [1, 2, 4, M] with 8M >= 33.
    """
    encoder = vae.encoder
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            for parameter in module.parameters():
                parameter.zero_()
    block0, down0, block1, down1, block2, down2, block3 = encoder.down_blocks
    assert isinstance(block0.conv_shortcut, nn.Identity)
    encoder.conv_in.weight[:3, :, -1, 1, 1] = torch.eye(3)
    _write_space(down0, linear.half)
    _write_pointwise(block1.conv_shortcut, torch.eye(HALF))
    _write_space(down1, linear.quarter)
    _write_time(down1, linear.quarter_time)
    _write_pointwise(block2.conv_shortcut, torch.eye(QUARTER))
    _write_space(down2, linear.eighth)
    _write_time(down2, linear.eighth_time)
    _write_pointwise(block3.conv_shortcut, torch.cat([linear.latent, -linear.latent]))
    block3.conv_shortcut.bias[2 * Z] = CONSTANT
    width = encoder.conv_out.in_channels
    encoder.norm_out.gamma.fill_(CONSTANT / width**0.5)
    encoder.conv_out.weight[:Z, :Z, -1, 1, 1] = torch.eye(Z)
    encoder.conv_out.weight[:Z, Z : 2 * Z, -1, 1, 1] = -torch.eye(Z)
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias.zero_()
    vae.quant_conv.weight[:Z, :Z, 0, 0, 0] = torch.diag(linear.scale)
    vae.quant_conv.bias[Z:] = 2 * torch.log(torch.tensor(POSTERIOR_STD))


def _write_pointwise(conv: nn.Conv3d, matrix: Tensor) -> None:
    conv.weight[: matrix.shape[0], : matrix.shape[1], -1, 0, 0] = matrix


def _write_space(down: Any, matrix: Tensor) -> None:
    """The first two rows and columns of a 3x3 convolution of stride 2 cover the block."""
    conv = down.resample[1]
    channels = matrix.shape[1] // 4
    conv.weight[: matrix.shape[0], :channels, :2, :2] = matrix.view(-1, channels, 2, 2)


def _write_time(down: Any, matrix: Tensor) -> None:
    """In a window of three frames at stride 2, the last two are the pair."""
    channels = matrix.shape[1] // 2
    down.time_conv.weight[:, :, 1, 0, 0] = matrix[:, :channels]
    down.time_conv.weight[:, :, 2, 0, 0] = matrix[:, channels:]


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("oc,bcfhw->bofhw", matrix.to(x.dtype), x[:, : matrix.shape[1]])


def _blocks(x: Tensor) -> Tensor:
    """[B C F H W] -> [B C*4 F H/2 W/2]: each channel's 2x2 pixels, row by row."""
    b, c, f, h, w = x.shape
    split = x.reshape(b, c, f, h // 2, 2, w // 2, 2)
    return split.permute(0, 1, 4, 6, 2, 3, 5).reshape(b, 4 * c, f, h // 2, w // 2)


def _pairs(x: Tensor) -> Tensor:
    """[B C F H W] -> [B 2C F/2 H W]: the channels of two consecutive frames."""
    return torch.cat([x[:, :, 0::2], x[:, :, 1::2]], 1)


def _components(x: Tensor, count: int) -> Tensor:
    """The `count` directions [count C] with the largest mean square over all places of x [B C F H W]."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1]).double()
    _, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return vectors[:, -count:].flip(1).T.float()


def _merge(channels: int, kept: int) -> Tensor:
    """[C 2C]: the normalised sum of two frames for the first `kept` channels, then differences of the first ones."""
    matrix = torch.zeros(channels, 2 * channels)
    half = 0.5**0.5
    for i in range(kept):
        matrix[i, i] = matrix[i, channels + i] = half
    for i in range(channels - kept):
        matrix[kept + i, i], matrix[kept + i, channels + i] = -half, half
    return matrix
