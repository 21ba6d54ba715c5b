"""Size rules, resizing, normalisation and padding of frames and masks."""

import numpy as np
import pytest
import torch

from flowmask.data_pipeline.clip.pixels import (
    check_shape,
    eval_size,
    pad_to_stride,
    resize_frame,
    resize_masks,
    short_side_size,
    to_signed,
    train_size,
)
from flowmask.models.errors import DataError

TRAIN = {"short_side": 480, "long_side": 832, "multiple": 32}
BOX = {"height": 480, "width": 832, "multiple": 16}


def test_a_full_hd_frame_trains_and_evaluates_at_the_published_sizes() -> None:
    assert train_size(1920, 1080, **TRAIN) == (832, 448) and train_size(1080, 1920, **TRAIN) == (448, 832)
    assert eval_size(1920, 1080, **BOX) == (832, 464)


@pytest.mark.parametrize(("w", "h"), [(640, 480), (480, 640), (137, 1000), (1000, 300), (91, 64), (4000, 3000)])
def test_sizes_keep_their_bounds_multiples_and_orientation(w: int, h: int) -> None:
    for (width, height), rule in ((train_size(w, h, **TRAIN), TRAIN), (eval_size(w, h, **BOX), BOX)):
        assert width % rule["multiple"] == 0 == height % rule["multiple"] and width and height
        assert (width >= height) == (w >= h) or abs(width - height) <= rule["multiple"]
    width, height = train_size(w, h, **TRAIN)
    assert max(width, height) <= 832 and min(width, height) <= 480
    width, height = eval_size(w, h, **BOX)
    assert width <= 832 and height <= 480


def test_without_a_long_side_only_the_short_side_counts() -> None:
    assert short_side_size(1000, 100, short_side=400, long_side=None) == (4000, 400)
    assert train_size(1000, 100, short_side=400, long_side=None, multiple=32) == (4000, 384)


@pytest.mark.parametrize(("size", "rule"), [(train_size, TRAIN), (eval_size, BOX)])
def test_a_side_that_would_be_0_is_refused_with_both_sizes(size: object, rule: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"frame of 832x13 would become 832x0"):
        size(832, 13, **rule)


def test_pixel_norms_map_black_and_white_where_their_statistics_say() -> None:
    frames = [np.zeros((4, 6, 3), np.uint8), np.full((4, 6, 3), 255, np.uint8)]
    half, imagenet = to_signed(frames), to_signed(frames, pixel_norm="imagenet")
    assert half.shape == (3, 2, 4, 6) and half.dtype == torch.float32
    assert (half[:, 0] == -1).all() and (half[:, 1] == 1).all()
    assert torch.allclose(imagenet[:, 0, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))


def test_channels_stay_in_rgb_order() -> None:
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 0] = 255
    assert to_signed([red])[:, 0, 0, 0].tolist() == [1, -1, -1]


def test_frames_are_resized_to_width_and_height() -> None:
    frame = np.zeros((20, 40, 3), np.uint8)
    assert resize_frame(frame, size=(16, 8)).shape == (8, 16, 3)
    assert resize_frame(frame, size=(40, 20)) is frame


@pytest.mark.parametrize(("source", "size"), [((40, 60), (48, 32)), ((7, 5), (64, 32)), ((480, 854), (832, 448))])
def test_a_mask_pixel_is_the_floor_of_its_place_in_the_source_in_float32(
    source: tuple[int, int], size: tuple[int, int]
) -> None:
    def place(count: int, of: int) -> np.ndarray:
        scale = np.float32(of) / np.float32(count)  # as the reference; sometimes one off the exact floor
        return np.floor(np.arange(count, dtype=np.float32) * scale).astype(int)

    masks = np.random.default_rng(0).random((2, *source)) > 0.5
    rows, columns = place(size[1], source[0]), place(size[0], source[1])
    assert np.array_equal(resize_masks(masks, size=size), masks[:, rows[:, None], columns])


@pytest.mark.parametrize(("frames", "padded"), [(1, 1), (2, 5), (5, 5), (6, 9), (17, 17), (18, 21)])
def test_the_last_frame_is_repeated_to_4k_plus_1(frames: int, padded: int) -> None:
    clip = torch.randn(3, frames, 2, 2)
    longer = pad_to_stride(clip, dim=1)
    assert longer.shape[1] == padded and torch.equal(longer[:, :frames], clip)
    assert (longer[:, frames:] == clip[:, -1:]).all()


def test_other_sizes_are_raised_to_the_multiple_and_right_ones_left_alone() -> None:
    assert check_shape(torch.rand(1, 3, 2, 21, 37)).shape == (1, 3, 2, 32, 48)
    right = torch.rand(2, 3, 2, 32, 48)
    assert check_shape(right) is right
    assert torch.allclose(check_shape(torch.full((1, 1, 1, 21, 37), 0.25)), torch.tensor(0.25))
