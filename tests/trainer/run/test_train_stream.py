"""Laws of training from a stream: a run on a URL equals the run on the folder, also after a stop."""

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from runs import SignalAt, losses, rows, run_group, start

from flowmask.models.errors import CacheError, CheckpointError
from flowmask.models.process import REQUEUE_EXIT_CODE

STREAM = {"data.mode": "stream", "data.shuffle_examples": 4, "data.retries": 0, "train.steps": 8}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(lab: Path) -> Iterator[str]:
    """The lab's cache on a separate web server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(lab / "cache")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_run_on_a_url_stopped_and_resumed_is_the_run_on_the_folder_that_never_stopped(
    lab: Path, url: str, tmp_path: Path
) -> None:
    assert start(lab, tmp_path / "whole", STREAM) == 0
    there = STREAM | {"data.cache": url}
    with SignalAt.on_every_run():
        assert start(lab, tmp_path / "stopped", there) == REQUEUE_EXIT_CODE
    assert len(losses(tmp_path / "stopped")) == SignalAt.step + 1
    with pytest.raises(CheckpointError, match=r"data\.mode: stream -> indexed"):
        start(lab, tmp_path / "stopped", {"train.steps": 8, "data.shuffle_examples": 4})
    assert start(lab, tmp_path / "stopped", there) == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    batches = [[row["batch"] for row in rows(tmp_path / name)] for name in ("stopped", "whole")]
    assert batches[0] == batches[1] and len(set(batches[0])) == 8


def test_two_ranks_on_a_url_stopped_and_resumed_train_as_if_they_had_not_been(
    lab: Path, url: str, tmp_path: Path
) -> None:
    overrides = STREAM | {"data.cache": url}
    job = {"lab": str(lab), "overrides": overrides}
    stopped = {"out": str(tmp_path / "stopped"), **job}
    jobs = [{"out": str(tmp_path / "whole"), **job}, {**stopped, "code": REQUEUE_EXIT_CODE, "signal_rank": 1}, stopped]
    run_group(jobs, folder=tmp_path / "logs")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_shard_that_is_gone_from_the_url_ends_the_run_in_one_line(lab: Path, tmp_path: Path) -> None:
    shutil.copytree(lab / "cache", tmp_path / "cache")
    for shard in (tmp_path / "cache/shards").glob("*.tar"):
        shard.unlink()
    with pytest.raises(CacheError, match=r"shards/\d+\.tar: cannot be read to its end \(No such file") as raised:
        start(lab, tmp_path / "run", STREAM | {"data.cache": str(tmp_path / "cache")})
    assert "\n" not in str(raised.value)
