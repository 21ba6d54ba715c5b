"""Laws of clip planning: it is a pure function, uses the reference's numbers, and mirrors sentences with pictures."""

from random import Random

import numpy as np
import pytest

from flowmask.data_pipeline.clip.clips import Geometry, clips_of, swap_sides
from flowmask.data_pipeline.config import CacheConfig, ClipConfig, DataSourceConfig
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Expression, Video

CLIP = ClipConfig(frames=5, short_side=32, long_side=64, size_multiple=16)


class Blank(Video):
    """A video of a given size and length, without pixels."""

    has_masks = True

    def __init__(self, *, size, length, texts=("the left one",), video_id="v"):
        self.video_id, self._size = video_id, size
        self.frame_names = tuple(f"{i:05d}" for i in range(length))
        self.expressions = tuple(Expression(str(i), text, ("1", "0", "1")) for i, text in enumerate(texts))

    size = property(lambda self: self._size)

    def frames(self, ids):
        raise NotImplementedError

    def mask(self, anno_ids, ids):
        raise NotImplementedError

    def files_digest(self):
        raise NotImplementedError


def plan(video, *, clip=CLIP, view=0, seed=0):
    return list(clips_of(video, index=0, first_number=7, view=view, clip=clip, cache=CacheConfig(seed=seed)))


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("the bright dog on the left", "the bright dog on the right"),
        ("Left of RIGHT, right-hand side", "Right of LEFT, left-hand side"),
        ("copyright, upright, leftover, cleft", "copyright, upright, leftover, cleft"),
        ("the leftmost one moving rightwards", "the rightmost one moving leftwards"),
        ("lefty left", "lefty right"),
    ],
)
def test_mirroring_swaps_whole_words_and_twice_is_nothing(text, mirrored):
    assert swap_sides(text) == mirrored
    assert swap_sides(mirrored) == text


def test_a_plan_is_a_function_of_source_and_config_alone(mevis):
    config = DataSourceConfig(source="mevis", root=mevis, split="train")
    first, second = ([clip for video in open_source(config).videos() for clip in plan(video, view=1)] for _ in range(2))
    assert first == second
    one = open_source(config).videos()[1]
    assert plan(one, view=1) != plan(one, view=0)
    assert plan(one, seed=1) != plan(one, seed=0)


def test_a_video_gives_a_clip_at_every_seventeenth_frame_with_its_anchor_in_it():
    clips = plan(Blank(size=(480, 854), length=60), clip=ClipConfig())
    assert [clip.number for clip in clips] == [7, 8, 9, 10]
    for clip, anchor in zip(clips, (0, 17, 34, 51), strict=True):
        assert len(clip.frame_ids) == 17 and anchor in clip.frame_ids
        assert list(clip.frame_ids) == sorted(clip.frame_ids)


@pytest.mark.parametrize(("length", "expected"), [(1, 1), (2, 5), (5, 5), (6, 9), (17, 17)])
def test_a_whole_video_is_one_clip_padded_with_its_last_frame(length, expected):
    whole = ClipConfig(sampling="whole", short_side=32, long_side=64, augment=False)
    (clip,) = plan(Blank(size=(40, 40), length=length), clip=whole)
    assert clip.frame_ids == (*range(length), *[length - 1] * (expected - length))


def test_without_augmentation_only_the_resize_rule_acts():
    (clip,) = plan(Blank(size=(1080, 1920), length=5), clip=ClipConfig(augment=False))
    geometry = clip.geometry
    assert (geometry.size, geometry.crop, geometry.resize, geometry.flip) == ((832, 448), None, None, False)


def test_augmentation_crops_half_the_clips_within_the_reference_limits_and_flips_half():
    geometries = [
        clip.geometry
        for view in range(400)
        for clip in plan(Blank(size=(720, 1280), length=4), view=view, clip=ClipConfig())
    ]
    cropped = [geometry for geometry in geometries if geometry.crop]
    assert 140 < len(cropped) < 260
    assert 140 < sum(geometry.flip for geometry in geometries) < 260
    assert {min(geometry.resize) for geometry in cropped} == {384, 480, 576}  # 400, 500, 600 rounded down by 32
    for geometry in cropped:
        left, top, width, height = geometry.crop
        assert 384 <= width <= min(geometry.resize[0], 600) and 384 <= height <= min(geometry.resize[1], 600)
        assert left + width <= geometry.resize[0] and top + height <= geometry.resize[1]
    for geometry in geometries:
        assert max(geometry.size) <= 832 and all(side % 32 == 0 and side for side in geometry.size)


def test_sentences_of_a_flipped_clip_are_mirrored_and_equal_sets_of_annotations_share_a_mask():
    video = Blank(size=(48, 64), length=5, texts=("The LEFT  one", "a bright thing"))
    flips = {clip.geometry.flip: clip for view in range(20) for clip in plan(video, view=view)}
    assert [sentence.text for sentence in flips[True].sentences] == ["the right one", "a bright thing"]
    assert [sentence.text for sentence in flips[False].sentences] == ["the left one", "a bright thing"]
    assert flips[True].masks == (("0", "1"),)


def test_frames_and_masks_go_through_one_geometry():
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[5:20, 10:30] = 255
    geometry = Geometry(source=(60, 40), resize=(90, 60), crop=(3, 3, 64, 48), size=(64, 48), flip=True)
    frame = geometry.frame(picture)
    mask = geometry.masks(picture[None, :, :, 0] > 0)[0]
    assert frame.shape == (48, 64, 3) and mask.shape == (48, 64)
    assert ((frame[:, :, 0] > 127) != mask).mean() < 0.02
    assert mask[10, 64 - 20] and not mask[10, 20], "the square stands on the other side"


def test_an_odd_video_still_makes_clips_of_the_right_length():
    random = Random(0)
    for _ in range(50):
        video = Blank(size=(48, 64), length=random.randint(1, 30))
        for clip in plan(video, view=random.randint(0, 9)):
            assert len(clip.frame_ids) == 5 and max(clip.frame_ids) < len(video.frame_names)


def test_a_video_without_expressions_makes_no_clip():
    assert plan(Blank(size=(48, 64), length=5, texts=())) == []
