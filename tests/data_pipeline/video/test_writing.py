"""The bytes of a written video depend on its frames alone."""

from pathlib import Path

import numpy as np

from flowmask.data_pipeline.video.writing import VideoWriter


def test_the_same_frames_give_the_same_bytes_wherever_they_lie_in_memory(tmp_path: Path) -> None:
    rows, columns = np.indices((64, 64))
    noise = np.random.default_rng(0).normal(0, 2, (64, 64))
    frames = []
    for i in range(17):
        frame = 90 + 40 * np.sin((rows + 2 * columns) / 20) + noise
        frame[20:40, 2 * i : 2 * i + 16] = 200
        frames.append(np.stack([frame, frame[::-1], frame.T], axis=-1).astype(np.uint8))
    written, taken = set(), []
    for number in range(24):
        taken.append(np.zeros(997 * number + 13, np.uint8))  # moves the next buffers to another address
        with VideoWriter(tmp_path / "film.mp4", height=64, width=64, fps=5) as writer:
            for frame in frames:
                writer.add(frame)
        written.add((tmp_path / "film.mp4").read_bytes())
    assert len(written) == 1
