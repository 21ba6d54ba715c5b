"""The notes about starts and ends in a folder, for `flowmask status`."""

from pathlib import Path

from flowmask.trainer.state.owner import note_end, note_start, read_start


def test_a_restart_is_a_start_after_one_that_did_not_end_well(tmp_path: Path) -> None:
    counted = []
    for code in (2, 75, None, 0, 0):  # None: killed
        note_start(tmp_path)
        start = read_start(tmp_path)
        assert start is not None
        counted.append((start.number, start.restarts))
        if code is not None:
            note_end(tmp_path, code=code)
    assert counted == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 3)]
