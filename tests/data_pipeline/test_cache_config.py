"""Impossible cache settings are refused with the value and the nearest valid one."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from flowmask.data_pipeline.config import CacheConfig, ClipConfig, LoaderConfig


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"frames": 16}, "frames is 16; it must be 4k . 1. Nearest: 13 or 17"),
        ({"size_multiple": 24}, "size_multiple is 24"),
        ({"short_side": 900}, "short_side 900 is larger than long_side 832"),
        ({"short_side": 16, "size_multiple": 32}, "short_side 16 is smaller"),
        ({"crop_min": 700}, "crop_min 700 is larger"),
        ({"framse": 17}, "framse"),
    ],
)
def test_clip_settings_that_cannot_run_are_refused(values, said):
    with pytest.raises(ValidationError, match=said):
        ClipConfig.model_validate(values)


def test_defaults_are_those_of_the_reference():
    clip = ClipConfig()
    assert (clip.frames, clip.short_side, clip.long_side, clip.size_multiple) == (17, 480, 832, 32)
    assert (clip.crop_short_sides, clip.crop_min, clip.crop_max) == ((400, 500, 600), 384, 600)
    assert (clip.crop_probability, clip.flip_probability) == (0.5, 0.5)
    assert CacheConfig().dtype == "bfloat16" and LoaderConfig(cache="c").remainder == "carry"


@pytest.mark.parametrize(
    ("data", "folders"),
    [
        ({"cache": "a/b"}, ["a/b"]),
        ({"cache": "a/b", "mode": "stream"}, ["a/b"]),
        ({"cache": "https://host/cache", "mode": "stream"}, []),
        ({"cache": "pipe:cat DIR/{}", "mode": "stream"}, []),
        ({"cache": "s3://bucket/{}", "mode": "stream"}, []),
        ({"mix": [{"cache": "a"}, {"cache": "/b", "weight": 2}]}, ["a", "/b"]),
    ],
)
def test_a_jobs_caches_are_the_folders_that_it_names_and_no_url(data, folders):
    assert LoaderConfig.model_validate(data).folders() == [Path(folder) for folder in folders]
