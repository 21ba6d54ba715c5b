"""The sizes of a measurement: the published model on a GPU, or the tiny one to try the script."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "tf32", "fp32"]  # tf32: fp32 with products rounded to TF32
Recompute = Literal["none", "selective", "full"]
Clip = tuple[int, int, int]  # frames, height, width in px


@dataclass(frozen=True)
class Scale:
    """clip: for training and evaluation; matrix: side of the largest product; within_s: time for one figure.

    wan: name of the folder of the weights; without weights it means the published model of that name.
    """

    name: str
    wan: str
    clip: Clip
    matrix: int
    within_s: float
    micro_batches: tuple[int, ...]
    compiled: tuple[bool, ...]
    attentions: tuple[str, ...]
    recomputes: tuple[Recompute, ...]
    precisions: tuple[Precision, ...]  # the first precision is measured first
    cached_clips: int
    encoder_compiler: str  # torch.compile's backend
    ranks: tuple[int, ...]


REAL = Scale(
    "Wan2.1 1.3B, 17x480x832",
    wan="Wan2.1-T2V-1.3B",
    clip=(17, 480, 832),
    matrix=8192,
    within_s=5.0,
    micro_batches=(1, 2, 4),
    compiled=(False, True),
    attentions=("native", "cudnn", "flash"),
    recomputes=("none", "selective", "full"),
    precisions=("bf16", "tf32", "fp32"),
    cached_clips=8,
    encoder_compiler="inductor",
    ranks=(1, 8),
)
TINY = Scale(
    "tiny Wan, 5x32x48",
    wan="tiny",
    clip=(5, 32, 48),
    matrix=256,
    within_s=0.05,
    micro_batches=(1,),
    compiled=(False,),
    attentions=("native", "cudnn"),
    recomputes=("none", "full"),
    precisions=("bf16",),
    cached_clips=4,
    encoder_compiler="eager",  # C++ for this encoder takes a compiler minutes
    ranks=(1,),
)
