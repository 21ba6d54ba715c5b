"""Masks are read back as written, from files and from memory."""

from pathlib import Path

import numpy as np
import pytest
from trials import SEED, TRIALS

from flowmask.trainer.score.mask_places import MaskFiles, MaskMemory


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_a_mask_comes_back_as_it_was_written_and_the_last_of_a_frame_counts(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(SEED)
    place = MaskFiles(tmp_path) if kind == "files" else MaskMemory()
    known = {}
    for _ in range(40 * TRIALS):
        frame, (height, width) = str(random.integers(20)), random.integers(1, 40, 2)
        known[frame] = random.random((height, width)) < random.random()
        place.write(frame, known[frame])
    for frame, mask in known.items():
        found = place.read(frame)
        assert found.dtype == np.bool_ and np.array_equal(found, mask)
