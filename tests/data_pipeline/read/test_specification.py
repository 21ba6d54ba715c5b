"""The cache format is as in docs/formats/cache.md: a reader made from that page alone reads the trainer's values."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.cache.index import ROW
from flowmask.data_pipeline.read.reader import LATENTS, NEEDS, CacheReader

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "read_cache.py"
OLDER = ROOT / "tests" / "golden" / "older" / "cache"


@pytest.fixture(scope="module")
def exact_cache(make_config, tmp_path_factory) -> Path:
    """A cache in float32."""
    config = make_config(tmp_path_factory.mktemp("exact") / "cache", cache={"dtype": "float32", "views": 1})
    build(config)
    return config.out


@pytest.mark.parametrize("which", ["cache", "exact_cache", None])
def test_every_example_read_with_numpy_alone_is_what_the_trainer_reads(which, request) -> None:
    folder = OLDER if which is None else request.getfixturevalue(which)
    read_example, reader = runpy.run_path(str(EXAMPLE))["read_example"], CacheReader(folder)
    for number in range(reader.manifest.examples):
        found = read_example(folder, number)
        batch = reader.read(np.array([number]), needs=NEEDS, text_tokens=256)
        for name in (*LATENTS, "text"):
            assert torch.equal(torch.from_numpy(found[name].copy()), batch[name][0].float()), (number, name)
        assert np.array_equal(found["mask"], batch["mask_pixels"][0].numpy())
        assert found["record"] == reader.record(number)


def test_the_example_runs_as_its_page_says(cache: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLE, cache, "0"], capture_output=True, text=True, check=True)
    assert "video_mean (16, 2, " in done.stdout and "sentence " in done.stdout


def test_the_page_has_every_field_of_a_row_in_its_order() -> None:
    page = (ROOT / "docs" / "formats" / "cache.md").read_text()
    types = {"<u8": "u64", "<u4": "u32", "<u2": "u16"}
    places = [page.index(f"| `{name}` | {types[ROW[name].str]} |") for name in ROW.names or ()]
    assert places == sorted(places) and f"A row has {ROW.itemsize} bytes" in page
