"""Run-length masks agree with COCO's own code, and damaged ones are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from flowmask.data_pipeline.formats import rle
from flowmask.models.errors import DataError


@settings(max_examples=60)
@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]), st.integers(0, 999))
def test_decode_inverts_encode_and_agrees_with_coco(height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    encoded = rle.encode(mask)
    assert np.array_equal(rle.decode(encoded, size=mask.shape, where="here"), mask)
    theirs = coco.decode({"size": encoded["size"], "counts": encoded["counts"].encode()})
    assert np.array_equal(theirs.astype(bool), mask)


def test_a_missing_mask_is_empty_and_plain_counts_are_read():
    assert not rle.decode(None, size=(3, 4), where="here").any()
    mask = rle.decode({"size": [2, 3], "counts": [1, 2, 3]}, size=(2, 3), where="here")
    assert mask.tolist() == [[False, True, False], [True, False, False]]


GOOD = rle.encode(np.eye(6, 7, dtype=bool))


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ({**GOOD, "size": [7, 6]}, "7x6"),
        ({**GOOD, "counts": GOOD["counts"][:-1]}, "cover|malformed"),
        ({**GOOD, "counts": GOOD["counts"] + "5"}, "cover|malformed"),
        ({**GOOD, "counts": ""}, "malformed"),
        ({**GOOD, "counts": "é"}, "ASCII"),
        ({**GOOD, "counts": "o" * 40}, "malformed"),
        ({**GOOD, "counts": [1, 2]}, "cover"),
        ({**GOOD, "counts": ["x"]}, "malformed"),
        ({"counts": GOOD["counts"]}, "size"),
        ("text", "COCO RLE"),
        (7, "COCO RLE"),
    ],
)
def test_a_damaged_mask_is_refused_with_its_place(damaged, said):
    with pytest.raises(DataError, match=rf"^video 7: .*({said})"):
        rle.decode(damaged, size=(6, 7), where="video 7")


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(0, 999))
def test_polygons_cover_the_union_that_coco_gives_them(height, width, count, seed):
    generator = np.random.default_rng(seed)
    polygons = [
        (generator.random(2 * generator.integers(3, 9)) * max(height, width) * 1.2).tolist() for _ in range(count)
    ]
    theirs = [coco.decode(coco.frPyObjects([polygon], height, width))[:, :, 0] for polygon in polygons]
    ours = rle.rasterise(polygons, size=(height, width), where="here")
    assert ours.dtype == bool and np.array_equal(ours, np.any(theirs, axis=0))


def test_a_rectangle_covers_its_pixels_and_two_points_none():
    expected = np.zeros((12, 10), bool)
    expected[3:9, 2:7] = True
    corners = [2, 3, 7, 3, 7, 9, 2, 9]
    assert np.array_equal(rle.rasterise([corners], size=(12, 10), where="here"), expected)
    assert np.array_equal(rle.rasterise([[0, 0, 5, 5], corners], size=(12, 10), where="here"), expected)
    assert not rle.rasterise([[0, 0, 5, 5]], size=(12, 10), where="here").any()


@pytest.mark.parametrize(
    ("polygons", "said"),
    [
        ([], "expected a list of polygons"),
        (7, "expected a list of polygons"),
        ([[1, 2, 3, 4, 5]], "not a list of finite x, y"),
        ([[1, 2, 3, 4, 5, float("nan")]], "not a list of finite x, y"),
        ([[[1, 2], [3, 4], [5, 6]]], "not a list of finite x, y"),
        ([[1, 2, "x", 4, 5, 6]], "not a polygon of numbers"),
        ([[1, 2, [3], 4, 5, 6]], "not a polygon of numbers"),
        ([[1, 2, 10**400, 4, 5, 6]], "not a polygon of numbers"),
        ([[0, 0, 1e9, 0, 0, 1e9]], r"to 1e\+09 px, but its image is 12x10"),
    ],
)
def test_a_damaged_polygon_is_refused_with_its_place(polygons, said):
    with pytest.raises(DataError, match=rf"^here: .*{said}"):
        rle.rasterise(polygons, size=(12, 10), where="here")


def reference(counts, total: int) -> list[int] | None:
    """Run lengths by COCO's definition in integers of any size; None if they are no mask of `total` px."""
    if isinstance(counts, str):
        runs, at = [], 0
        while at < len(counts):
            value = shift = 0
            while True:
                if at == len(counts) or not 0 <= (code := ord(counts[at]) - 48) <= 63:
                    return None
                value |= (code & 31) << shift
                shift, at = shift + 5, at + 1
                if not code & 32:
                    break
            value -= (1 << shift) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        counts = runs
    whole = all(type(count) is int and count >= 0 for count in counts)
    return counts if counts and whole and sum(counts) == total else None


WRAPPING = [2**62, 2**62, 2**62, 2**62 + 12]  # their sum is 12 in 64 bits
texts = st.one_of(
    st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=40),
    st.lists(st.sampled_from(["0", "1", "4", "P", "o" * 11 + "1", "o" * 12 + "?"]), max_size=8).map("".join),
)  # fmt: skip
numbers = st.lists(
    st.one_of(
        st.integers(0, 12), st.sampled_from([-1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, True, 1.0, None])
    ),
    max_size=8,
)


@settings(max_examples=300)
@given(st.one_of(texts, numbers, st.permutations(WRAPPING)))
def test_any_counts_are_the_mask_that_coco_defines_or_refused(counts):
    runs = reference(counts, 12)
    try:
        mask = rle.decode({"size": [3, 4], "counts": counts}, size=(3, 4), where="here")
    except DataError as error:
        assert runs is None and str(error).startswith("here: ")
    else:
        assert runs is not None
        assert mask.T.reshape(-1).tolist() == [bool(i % 2) for i, count in enumerate(runs) for _ in range(count)]


def coded(value: int) -> str:
    """A count as COCO writes it, of any size."""
    code = ""
    while True:
        group, value = value & 31, value >> 5
        done = value == (-1 if group & 16 else 0)
        code += chr(48 + (group | (0 if done else 32)))
        if done:
            return code


@pytest.mark.parametrize("counts", [WRAPPING, "".join(map(coded, [2**58, 2**58, 2**58, 2**58] * 16 + [12]))])
def test_counts_whose_sum_wraps_are_refused(counts):
    with pytest.raises(DataError, match=r"^here: malformed RLE counts"):
        rle.decode({"size": [3, 4], "counts": counts}, size=(3, 4), where="here")


@pytest.mark.parametrize(
    "size", [[3, 4.5], [3, "4"], [3], 12, None, [3, 4, 1], [float("nan"), 4], [2**62, 2**62], [3, True]]
)
def test_a_size_that_is_not_the_frames_is_refused(size):
    with pytest.raises(DataError, match=r"^here: "):
        rle.decode({"size": size, "counts": [12]}, size=(3, 4), where="here")


def test_a_polygon_that_draws_its_picture_over_and_over_is_refused_at_once():
    star = [0, 0, 11, 9] * 100_000
    with pytest.raises(DataError, match=r"here: a contour of \d+ px, but its image is 12x10"):
        rle.rasterise([star], size=(12, 10), where="here")
