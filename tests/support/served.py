"""The page as users have it: a separate process on a machine whose network is refused, and visitors."""

import http.client
import io
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import page_environment

PATIENCE_S = 240.0
DONE = "document.querySelector('#status').innerText.startsWith('Done')"
# Every Python of the page's process loads this first: it records each call to another machine, and refuses it.
NO_NETWORK = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else "localhost"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if host not in (None, "localhost", "127.0.0.1", b"127.0.0.1", "::1"):
        with open(os.environ["OUTWARD"], "a") as file:
            print(event, host, file=file)
        raise OSError(f"the network is refused: {host}")
sys.addaudithook(refuse)
"""


@dataclass
class Served:
    """An open page. outward: calls to other machines by its process; its files are in `folder`/out."""

    url: str
    process: subprocess.Popen[str]
    environment: dict[str, str]
    folder: Path
    log: Path

    @property
    def outward(self) -> str:
        path = Path(self.environment["OUTWARD"])
        return path.read_text() if path.exists() else ""

    def files(self) -> list[Path]:
        """Uploads and results that are there now; Gradio's file names for uploads hold no bytes."""
        found = []
        for folder, _, names in os.walk(self.folder / "out"):
            for path in (Path(folder, name) for name in names if "/files" in folder):
                with suppress(FileNotFoundError):  # the file was removed in the meantime
                    found += [path] if path.stat().st_size else []
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def served(folder: Path, *command: object) -> Iterator[Served]:
    """Start a command that serves the page, and wait for the address on its stdout."""
    (folder / "refuse").mkdir(parents=True)
    (folder / "here").mkdir()
    (folder / "refuse" / "sitecustomize.py").write_text(NO_NETWORK)
    environment = page_environment(folder / "refuse") | {"OUTWARD": str(folder / "outward.txt")}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder / "here",
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = re.fullmatch(r"(http://127\.0\.0\.1:\d+)\n", line)
            assert address, line + (folder / "log.txt").read_text()
            site = Served(address[1], process, environment, folder, folder / "log.txt")
            assert site.outward == ""
            yield site
        finally:
            process.kill()
            process.wait()


class Visitor:
    """A user with the page open."""

    def __init__(self, context: Any, url: str) -> None:
        self.asked: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(1000 * PATIENCE_S)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", lambda dialog: pytest.fail(f"a script of somebody else ran: {dialog.message}"))
        self.page.goto(url)
        self.page.wait_for_selector("#find")

    @property
    def status(self) -> str:
        return str(self.page.inner_text("#status"))

    def upload(self, file: Any) -> None:
        self.page.set_input_files("#clip input[type=file]", file)

    def says(self, words: str) -> None:
        """Wait until the page shows the words."""
        self.page.wait_for_function("words => document.body.innerText.includes(words)", arg=words)
        assert "Traceback" not in self.page.inner_text("body")

    def ask(self, text: str) -> None:
        self.page.fill("#text textarea", text)
        self.page.click("#find")

    def download(self) -> zipfile.ZipFile:
        with self.page.expect_download() as download:
            self.page.click("#download")
        assert download.value.suggested_filename == "flowmask.zip"
        return zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))


@contextmanager
def visit(chromium: Any, url: str) -> Iterator[Visitor]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    try:
        yield Visitor(context, url)
    finally:
        context.close()


def request(site: Served, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
    """One HTTP request with an unchanged path."""
    connection = http.client.HTTPConnection(urlsplit(site.url).netloc, timeout=60)
    connection.request(method, path, body or None, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def until(happens: Callable[[], bool]) -> None:
    """Wait until it happens."""
    end = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.005)
