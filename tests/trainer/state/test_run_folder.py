"""A run folder has one writer, and its rows are never doubled, cut off or rewritten."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowmask.models.errors import CheckpointError
from flowmask.models.files import write_atomically
from flowmask.trainer.state.run_folder import METRICS, RunFolder

HOLD = """
import sys, time
from pathlib import Path
from flowmask.trainer.state.run_folder import RunFolder
RunFolder(Path(sys.argv[1]))
sys.stdout.write("locked\\n"); sys.stdout.flush()
time.sleep(60)
"""


def test_a_second_writer_is_refused_by_name_until_the_first_dies_however_it_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        with pytest.raises(CheckpointError, match=f"being written by process {holder.pid} on"):
            RunFolder(tmp_path, patience_s=0.2)
        holder.kill()
        RunFolder(tmp_path, patience_s=15).close()


def row(step: int) -> bytes:
    return json.dumps({"step": step, "loss": 1 / (step + 2)}).encode() + b"\n"


DAMAGED = [b"", b'{"step": 6, "lo', b"\x00\x00\n", b'{"loss": 1}\n', b"6\n"]
DAMAGED += [
    b'{"step": %s}\n' % step for step in (b"Infinity", b"1e999", b"NaN", b"5.5", b"true", b'"5"', b"null", b"[5]")
]


@pytest.mark.parametrize("torn", DAMAGED)
@pytest.mark.parametrize(("after", "kept"), [(0, 0), (3, 3), (5, 5), (9, 5)])
def test_a_resume_keeps_the_rows_of_its_checkpoint_byte_for_byte_and_no_others(
    tmp_path: Path, torn: bytes, after: int, kept: int
) -> None:
    path = tmp_path / METRICS
    path.write_bytes(b"".join(row(step) for step in range(1, 6)) + torn)
    folder = RunFolder(tmp_path)
    folder.open_metrics(after_step=after)
    assert path.read_bytes() == b"".join(row(step) for step in range(1, kept + 1))
    folder.add_row({"step": kept + 1})
    folder.sync()
    folder.close()
    assert path.read_bytes().endswith(b'{"step": %d}\n' % (kept + 1))


@pytest.mark.parametrize("damaged", [line for line in DAMAGED if line.endswith(b"\n")])
def test_a_damaged_row_costs_no_other_row(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / METRICS
    path.write_bytes(row(1) + row(2) + damaged + row(3) + row(4))
    folder = RunFolder(tmp_path)
    folder.open_metrics(after_step=3)
    folder.close()
    assert path.read_bytes() == row(1) + row(2) + row(3)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(CheckpointError, match=r"not a run but holds holiday\.jpg"):
        RunFolder(tmp_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "config.yaml").write_text("cache: {views: 1}\n")
    with pytest.raises(CheckpointError, match="not a run"):
        RunFolder(cache)


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="can't be written"):
        RunFolder(tmp_path / "file" / "run")


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", "one")
    write_atomically(tmp_path / "f", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "two"
