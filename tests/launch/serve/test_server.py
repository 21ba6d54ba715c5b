"""The page's process: its address, and its end, with or without visitors, which leaves no files."""

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from served import served, until, visit

from flowmask.launch.serve.server import address_of, clips_in, listen, warning
from flowmask.models.errors import ConfigError

SLOW = Path(__file__).parents[2] / "support" / "slow_page.py"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_leaves_frees_the_page_and_a_stop_ends_it_within_seconds(
    chromium: Any, lab: Path, tmp_path: Path, number: int
) -> None:
    with served(tmp_path, SLOW, tmp_path / "out") as site:
        for words in ("first", "second"):
            with visit(chromium, site.url) as me:
                me.upload(lab / "film9.mp4")
                me.says("0.9 s")
                me.ask(words)
                until(lambda words=words: f"begins {words}" in site.log.read_text())  # type: ignore[misc]
                me.says("Windows")
                if words == "second":
                    began = time.monotonic()
                    assert site.end(number) == 0
                    assert time.monotonic() - began < 15
            if words == "first":
                until(lambda: "ends first" in site.log.read_text() and not site.files())
        assert list((tmp_path / "out").iterdir()) == []
        assert "Traceback" not in site.log.read_text()


def test_a_port_that_is_taken_is_one_line_with_the_fix() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert address_of(listening) == f"http://127.0.0.1:{port}"
        with pytest.raises(
            ConfigError, match=rf"can't listen at 127\.0\.0\.1:{port}: .*; give another --port, or --port 0"
        ):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        listen("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="--host not a host is not an address"):
        listen("not a host", 0)


def test_a_host_that_others_reach_gets_a_warning() -> None:
    assert warning("127.0.0.1") is warning("localhost") is warning("::1") is None
    assert "anyone who can reach this machine" in (warning("0.0.0.0") or "")
    with listen("0.0.0.0", 0) as listening:
        assert address_of(listening).startswith(f"http://{socket.gethostname()}:")


def test_the_clips_to_choose_from_are_the_files_of_a_folder(tmp_path: Path) -> None:
    assert clips_in(None) == {}
    for folder, said in ((tmp_path / "none", "is not a folder"), (tmp_path, "is empty")):
        with pytest.raises(ConfigError, match=said):
            clips_in(folder)
    for name in ("a.mp4", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert clips_in(tmp_path) == {"a.mp4": tmp_path / "a.mp4"}
