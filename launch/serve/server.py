"""The process of the page: its socket, its checks before Gradio, and its end."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmask.launch.serve import page
from flowmask.launch.serve.alone import is_this_machine, stay_alone
from flowmask.launch.serve.limits import LimitError, Limits
from flowmask.launch.serve.service import Service
from flowmask.models.errors import ConfigError
from flowmask.models.folders.scratch import scratch
from flowmask.models.process import stop_signals

if TYPE_CHECKING:
    from flowmask.trainer.predict.predict import Predictions

_STOP_S = 5.0  # time for a running request to reach its next step after a stop request
_ANSWERS_S = 2  # for answers that are being sent
Message = MutableMapping[str, Any]
Send = Callable[[Message], Any]
# The browser must not connect to other hosts, even if Gradio's page names them.
_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; port 0: a free one. Raises ConfigError if it is taken or not local."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(
            f"--host {host} is not an address of this machine: {error.strerror}; try 127.0.0.1"
        ) from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        fix = "give another --port, or --port 0 for a free one"
        raise ConfigError(f"can't listen at {host}:{port}: {str(error.strerror).lower()}; {fix}") from error
    return listening


def address_of(listening: socket.socket) -> str:
    """The URL for a browser."""
    host, port, *_ = listening.getsockname()
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def warning(host: str) -> str | None:
    """A warning, in one line, for a host that other machines can reach; None otherwise."""
    if is_this_machine(host):
        return None
    return f"--host {host}: anyone who can reach this machine can use the page; there is no password"


def clips_in(folder: Path | None) -> dict[str, Path]:
    """The files of a folder by their names; raises ConfigError if the folder is missing or empty."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ConfigError(f"--clips {folder} is not a folder; give a folder with video files")
    files = {path.name: path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
    if not files:
        raise ConfigError(f"--clips {folder} is empty; put videos into it")
    return files


def serve(
    listening: socket.socket,
    segment: Callable[[], Callable[..., "Predictions"]],
    *,
    title: str,
    clips: Mapping[str, Path],
    limits: Limits,
    parent: Path,
    on_ready: Callable[[], None],
) -> None:
    """Serve the page until a signal requests the end; then remove all its files.

    segment: loads the weights and returns `predict` with them; parent: folder for a folder of uploads and results
    """
    for number in stop_signals():
        signal.signal(number, _end)
    with scratch(parent) as place:
        files = place / "files"
        files.mkdir()
        stay_alone(files)
        service = Service(segment(), folder=files, clips=clips, limits=limits)
        door = Door(page.application(service, title=title), service)
        try:
            _answer_until_asked_to_end(door, listening, on_ready)
        finally:
            service.close(patience_s=_STOP_S)


def _end(number: int, frame: object) -> None:
    """Unwind the main thread, which cleans up; later signals are ignored."""
    for other in stop_signals():
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(0)


def _answer_until_asked_to_end(door: "Door", listening: socket.socket, on_ready: Callable[[], None]) -> None:
    import uvicorn

    config = uvicorn.Config(door, log_level="error", access_log=False, ws="none", timeout_graceful_shutdown=_ANSWERS_S)
    server = uvicorn.Server(config)
    # A daemon, like the threads that it starts: the process can end while one computes.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="page", daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.02)
        if server.started:
            on_ready()
        while thread.is_alive():
            thread.join(1.0)
        raise RuntimeError("the web server ended by itself")
    finally:
        server.should_exit = True
        thread.join(_ANSWERS_S + 1)


class Door:
    """Handles every request first: refuses bodies that are too large, and adds the security headers."""

    def __init__(self, inner: Any, service: Service) -> None:
        self._inner, self._service = inner, service

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        if scope["type"] == "http" and scope["method"] == "POST":
            upload = scope["path"].rstrip("/").endswith("/upload")
            refused = await asyncio.to_thread(self._refused, dict(scope["headers"]), upload=upload)
            if refused is not None:
                await _say(refused, with_headers)
                return
        await self._inner(scope, receive, with_headers)

    def _refused(self, headers: Mapping[bytes, bytes], *, upload: bool) -> str | None:
        """The reason to refuse a body; None to read it. An upload goes to disk, any other body into memory."""
        digits = headers.get(b"content-length", b"" if upload or b"transfer-encoding" in headers else b"0")
        limits = self._service.limits
        try:
            limits.refuse_body(int(digits[:20]) if digits.isdigit() else None, upload=upload)
            if upload:
                self._service.make_room()
        except LimitError as error:
            return str(error)
        return None


async def _say(line: str, send: Send) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": line.encode()})
