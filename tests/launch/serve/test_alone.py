"""A process after `stay_alone` reaches no other machine by any call; its own sockets work."""

import subprocess
import sys
from pathlib import Path

import pytest

from flowmask.launch.serve.alone import is_this_machine

TRIED = """
import asyncio, os, socket, urllib.request
from pathlib import Path
os.environ["GRADIO_SHARE"] = "1"
from flowmask.launch.serve.alone import stay_alone
stay_alone(Path("files"))
assert "GRADIO_SHARE" not in os.environ and os.environ["GRADIO_TEMP_DIR"] == "files"
udp = lambda: socket.socket(type=socket.SOCK_DGRAM)
outward = {
    "connect": lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    "connect_ex": lambda: socket.socket().connect_ex(("192.0.2.1", 80)),
    "of IPv6": lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
    "packet": lambda: udp().sendto(b"x", ("192.0.2.1", 80)),
    "message": lambda: udp().sendmsg([b"x"], [], 0, ("192.0.2.1", 80)),
    "name": lambda: socket.getaddrinfo("example.invalid", 80),
    "older name": lambda: socket.gethostbyname("example.invalid"),
    "library": lambda: urllib.request.urlopen("http://192.0.2.1/", timeout=1),
    "asyncio": lambda: asyncio.run(asyncio.open_connection("192.0.2.1", 80)),
}
for name, attempt in outward.items():
    try:
        attempt()
    except OSError as error:
        assert "connects to no other machine" in str(error), (name, error)
    else:
        raise SystemExit(f"{name} got through")
server = socket.create_server(("127.0.0.1", 0))
with socket.create_connection(("localhost", server.getsockname()[1])):
    pass
udp().sendto(b"x", server.getsockname())
one, other = socket.socketpair()
one.sendmsg([b"x"])
assert other.recv(1) == b"x"
"""


def test_nothing_leaves_this_machine(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TRIED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("host", "here"),
    [
        *((name, True) for name in (None, "localhost", "127.0.0.1", "127.8.9.1", "::1", b"127.0.0.1")),
        *((name, False) for name in ("0.0.0.0", "::", "10.0.0.1", "example.com", "127.0.0.1.example.com", "")),
    ],
)
def test_only_loopback_is_this_machine(host: object, here: bool) -> None:
    assert is_this_machine(host) is here
