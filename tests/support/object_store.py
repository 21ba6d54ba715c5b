"""moto's S3 server in a separate process, and a proxy before it that counts, delays, cuts and fails.

The system chooses the port of each; the process is ended by its pid.
"""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from typing import Any

from flowmask.data_pipeline.cache import objects

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""
BUCKET = "caches"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "an-id",
    "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-prints",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


@contextmanager
def moto_process() -> Iterator[int]:
    """The port of a server with an empty bucket."""
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            put(port, f"/{BUCKET}")
            yield port
        finally:
            server.terminate()


def put(port: int, path: str, content: bytes = b"") -> None:
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("PUT", path, body=content)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200, (path, answer.status)
    connection.close()


def upload(port: int, folder: Path, prefix: str) -> str:
    """Put the files of a cache into the bucket; returns the URL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            put(port, f"/{BUCKET}/{prefix}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://{BUCKET}/{prefix}"


Fault = str | int | None  # "cut", "reset", "delay", "short": a whole answer of fewer bytes; an HTTP code; none


@dataclass(frozen=True)
class Asked:
    """One request: the object's path, and its range (start, stop), if it has one."""

    path: str
    range: tuple[int, int] | None


@dataclass
class Proxy:
    """The requests that the proxy saw, and its faults: `fault` is called for each GET."""

    backend: int
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    fault: Callable[[Asked], Fault] = lambda _: None
    delay_s: float = 0.0
    together: int = 0  # requests in progress; `most_together` is the most so far
    most_together: int = 0
    gate: int = 0  # answer nothing before this many requests have come
    lock: Any = field(default_factory=threading.Condition)

    def reset(self) -> None:
        """Remove all faults, and forget the requests."""
        self.fault, self.delay_s, self.most_together, self.gate = lambda _: None, 0.0, 0, 0
        self.asked.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ranges(self) -> list[Asked]:
        """The requests for parts of shards."""
        return [one for one in self.asked if one.range is not None and one.path.endswith(".tar")]


@contextmanager
def own_connection() -> Iterator[None]:
    """While inside, this process makes a new client from the environment, and keeps it."""
    objects._connection.cache_clear()
    try:
        yield
    finally:
        objects._connection.cache_clear()


@contextmanager
def proxy_before(backend: int) -> Iterator[Proxy]:
    proxy = Proxy(backend)

    class Handler(_Handler):
        seen = proxy

    server = _Server(("127.0.0.1", 0), Handler)
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, *_: object) -> None:
        """Ignore a client that hangs up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    seen: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        seen = self.seen
        found = self.headers.get("Range", "").removeprefix("bytes=").split("-")
        asked = Asked(self.path, (int(found[0]), int(found[1]) + 1) if len(found) == 2 else None)
        with seen.lock:
            seen.asked.append(asked)
            fault = seen.fault(asked)
            seen.together += 1
            seen.most_together = max(seen.most_together, seen.together)
            seen.lock.notify_all()
            seen.lock.wait_for(lambda: len(seen.asked) >= seen.gate, timeout=60)
        try:
            self._answer(fault)
        finally:
            with seen.lock:
                seen.together -= 1

    def _answer(self, fault: Fault) -> None:
        sleep(self.seen.delay_s * (10 if fault == "delay" else 1))
        if fault == "reset":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._send(fault, {}, b"<Error><Code>SlowDown</Code></Error>" if fault == 503 else b"")
            return
        backend = HTTPConnection("127.0.0.1", self.seen.backend)
        backend.request("GET", self.path, headers=dict(self.headers.items()))
        answer = backend.getresponse()
        content, headers = answer.read(), dict(answer.getheaders())
        backend.close()
        if fault == "short":
            content = content[: len(content) // 2]
        self._send(answer.status, headers, content, cut=fault == "cut")

    def _send(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        kept = {"content-range", "content-type", "etag", "last-modified", "location"}
        for name, value in headers.items():
            if name.lower() in kept:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.close_connection = True
