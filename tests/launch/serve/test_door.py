"""The requests that are refused before Gradio sees them, and the headers of every answer."""

import asyncio
from typing import Any

import pytest

from flowmask.launch.serve.limits import LimitError, Limits
from flowmask.launch.serve.server import Door


class FullService:
    """A service whose folder is full."""

    limits = Limits(megabytes=1)

    def make_room(self) -> None:
        raise LimitError("the server has no room for more clips; try again later")


@pytest.mark.parametrize(
    ("path", "headers", "said"),
    [
        ("upload", {}, "must state its size"),
        ("upload/", {b"content-length": b"-1"}, "must state its size"),
        ("upload", {b"content-length": b"9" * 5000}, "at most 1 MB are accepted"),
        ("upload", {b"content-length": b"10"}, "no room for more clips"),
        ("queue/join", {b"content-length": b"1000000"}, "has 1000000 bytes"),
        ("queue/join", {b"transfer-encoding": b"chunked"}, "must state its size"),
    ],
)
def test_a_body_that_is_not_taken_is_refused_before_its_first_byte_is_read(
    path: str, headers: dict[bytes, bytes], said: str
) -> None:
    async def unread() -> Any:
        raise AssertionError("the body was read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": f"/gradio_api/{path}", "headers": [*headers.items()]}
    asyncio.run(Door(None, FullService())(scope, unread, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 413 and said in sent[1]["body"].decode()
    assert b"content-security-policy" in dict(sent[0]["headers"])
