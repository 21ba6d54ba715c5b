"""Run-length masks agree with COCO's own code, and damaged ones are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from data_pipeline import rle
from models.errors import DataError


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 50), st.integers(1, 50), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]), st.integers(0, 999)
)
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
