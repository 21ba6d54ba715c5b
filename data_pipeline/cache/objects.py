"""A folder of an object store (`s3://bucket/path`), read as whole objects and by ranges; the only file that uses s3fs.

Temporary faults (no connection, a truncated answer, 5xx, "slow down") are retried, each request separately. Permanent
faults (no such object, no permission, no credentials) are an error at once. Errors name the object and the fix.
Credentials and server come from the environment, as for AWS's own tools (AWS_PROFILE, AWS_ENDPOINT_URL, ...); they are
in no config, message or file.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from flowmask.models.errors import CacheError, ConfigError
from flowmask.models.safe.secrets import masked_uri

T = TypeVar("T")
_AT_ONCE = 64  # requests of a process
_CONNECT_S, _STALL_S = 30, 60  # seconds without an answer after which a request has failed
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0  # wait before the first retry, doubled before each later one
_PIECE, _PIECES = 8 << 20, 8  # bytes of a piece of a whole object; number of pieces requested together
_PASSING = {408, 429}  # HTTP codes below 500 that are retried
_CREDENTIALS = "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_REFUSED = {
    "NoSuchBucket": "there is no such bucket; check data.cache and AWS_ENDPOINT_URL",
    "NoSuchKey": "there is no such object; check data.cache, or upload the whole cache again",
    "404": "there is no such object; check data.cache, or upload the whole cache again",
    "416": "it ends too early: upload it again",
    "InvalidRange": "it ends too early: upload it again",
}


@dataclass(frozen=True)
class ByteRange:
    """Bytes start..stop-1 of an object with a total of `size` bytes."""

    name: str
    start: int
    stop: int
    size: int


class ObjectStore:
    """The objects below a URL. Thread safe."""

    def __init__(self, url: str, *, retries: int):
        """retries: number of retries of a request."""
        self.url, self._retries = url.rstrip("/"), retries
        self._bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._connection = _connection()

    def whole(self, name: str, *, limit: int) -> bytes:
        """An object; CacheError if it has more than `limit` bytes."""

        async def get(client: Any) -> bytes:
            answer = await client.get_object(Bucket=self._bucket, Key=self._prefix + name)
            if answer["ContentLength"] > limit:
                raise CacheError(f"{self.url}/{name}: it has more than {limit} bytes")
            return await _body(answer, length=answer["ContentLength"])

        return self._all([(name, get)])[0]

    def ranges(self, wanted: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range, requested together. Raises CacheError for an object of another size."""

        def asking(one: ByteRange) -> Callable[[Any], Awaitable[bytes]]:
            async def get(client: Any) -> bytes:
                asked = f"bytes={one.start}-{one.stop - 1}"
                answer = await client.get_object(Bucket=self._bucket, Key=self._prefix + one.name, Range=asked)
                total = answer.get("ContentRange", "").rpartition("/")[2]
                if total.isdecimal() and int(total) != one.size:
                    self.refuse_size(one.name, int(total), expected=one.size)
                return await _body(answer, length=one.stop - one.start)

            return get

        return self._all([(one.name, asking(one)) for one in wanted])

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """A whole object of this size from front to back, with a few pieces in memory at a time."""
        starts = range(0, size, _PIECE)
        for first in range(0, len(starts), _PIECES):
            asked = starts[first : first + _PIECES]
            yield from self.ranges([ByteRange(name, start, min(start + _PIECE, size), size) for start in asked])

    def sizes(self) -> dict[str, int]:
        """Bytes of every object below the URL, by name."""
        start = self._prefix

        async def ask(client: Any) -> dict[str, int]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start)
            return {
                entry["Key"].removeprefix(start): entry["Size"]
                async for page in pages
                for entry in page.get("Contents", ())
            }

        return self._all([("", ask)])[0]

    def refuse_size(self, name: str, size: int, *, expected: int) -> None:
        if size != expected:
            raise CacheError(
                f"{self.url}/{name}: {size} bytes, the manifest says {expected}: it is truncated, or of another "
                "cache; upload the whole cache again"
            )

    def _all(self, asked: Sequence[tuple[str, Callable[[Any], Awaitable[T]]]]) -> list[T]:
        """The answers to all requests. Raises the first error after all have ended."""
        from fsspec.asyn import sync

        async def run() -> list[Any]:
            return await asyncio.gather(*(self._tried(*one) for one in asked), return_exceptions=True)

        answers = sync(self._connection.files.loop, run)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return list(answers)

    async def _tried(self, name: str, ask: Callable[[Any], Awaitable[T]]) -> T:
        import aiohttp
        from botocore.exceptions import BotoCoreError, ClientError

        wait, reason = _FIRST_WAIT_S, ""
        for attempt in range(self._retries + 1):
            if attempt:
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)
            try:
                async with self._connection.turns:
                    return await ask(await self._client())
            except (BotoCoreError, ClientError, aiohttp.ClientError, OSError, TimeoutError) as error:
                refused, reason = _judged(error)
                if refused:
                    raise CacheError(f"{self.url}/{name}: {reason}") from error
        times = f"tried {self._retries + 1} times" if self._retries else "data.retries is 0"
        raise CacheError(
            f"{self.url}/{name}: cannot be read ({reason}); {times}: check the network and AWS_ENDPOINT_URL, or raise "
            "data.retries"
        )

    async def _client(self) -> Any:
        try:
            await self._connection.files.set_session()
        except ValueError as error:  # caused by an endpoint, or by a value in AWS's own config
            raise CacheError(f"{self.url}: {masked_uri(str(error))}; check AWS_ENDPOINT_URL") from error
        return await self._connection.files.get_s3(self._bucket)


class _Connection:
    """The client of this process, and the limit of its parallel requests."""

    def __init__(self, files: Any):
        self.files, self.turns = files, asyncio.Semaphore(_AT_ONCE)


@lru_cache(maxsize=1)
def _connection() -> _Connection:
    try:
        from s3fs import S3FileSystem
    except ImportError:
        raise ConfigError("a cache at s3:// needs s3fs: pip install 'flowmask[s3]'") from None
    settings = {
        "connect_timeout": _CONNECT_S,
        "read_timeout": _STALL_S,
        "max_pool_connections": _AT_ONCE,
        "retries": {"total_max_attempts": 1},  # ours are the only ones
    }
    return _Connection(S3FileSystem(anon=False, config_kwargs=settings, skip_instance_cache=True))


def hash_of(pieces: Iterable[bytes]) -> str:
    """SHA-256 of all pieces, one after another."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


async def _body(answer: Any, *, length: int) -> bytes:
    async with answer["Body"] as body:
        content: bytes = await body.read()
    if len(content) != length:
        raise OSError(f"an answer of {len(content)} bytes in place of {length}")
    return content


def _judged(error: Exception) -> tuple[bool, str]:
    """Whether a retry is useless, and the reason (with the fix if it is useless)."""
    from botocore import exceptions as known

    if isinstance(error, known.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if status >= 500 or status in _PASSING or code == "SlowDown":
            return False, f"the server answers {status} {code}"
        if code in _REFUSED:
            return True, _REFUSED[code]
        return True, f"the server refuses it with {status} {code}; check the credentials: {_CREDENTIALS}"
    network = (known.HTTPClientError, known.ConnectionError, known.IncompleteReadError)
    if isinstance(error, known.BotoCoreError) and not isinstance(error, network):
        return True, f"no usable credentials ({type(error).__name__}); {_CREDENTIALS}"
    said = masked_uri(" ".join(str(error).split()))[:200]
    return False, f"{type(error).__name__}: {said}" if said else type(error).__name__
