"""A folder of an object store (`s3://bucket/path`), read as whole objects and by ranges; the only file with obstore.

Temporary faults (no connection, a truncated answer, 5xx, "slow down") are retried, each request separately. Permanent
faults (no such object, no permission, no credentials) are an error at once. Errors name the object and the fix.
Credentials, server and region are found by botocore, the library of AWS's own tools (AWS_PROFILE, AWS_ENDPOINT_URL,
~/.aws, the machine's role); they are in no config, message or file.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from flowmask.models.errors import CacheError, ConfigError
from flowmask.models.safe.secrets import masked_uri

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Credential, S3Store

T = TypeVar("T")
_AT_ONCE = 64  # requests of a process
_CONNECT_S, _STALL_S = 30, 60  # seconds without an answer after which a request has failed
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0  # wait before the first retry, doubled before each later one
_PIECE, _PIECES = 8 << 20, 8  # bytes of a piece of a whole object; number of pieces requested together
_CREDENTIALS_MIN = 9  # lifetime of a copy of the credentials; botocore renews those that expire within 10 minutes
_PASSING = {408, 429}  # HTTP codes below 500 that are retried
_CREDENTIALS = "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_NO_OBJECT = "there is no such object; check data.cache, or upload the whole cache again"
_REGION = "the bucket is in another region; export AWS_DEFAULT_REGION, or check AWS_ENDPOINT_URL"
_REFUSED = {
    "NoSuchBucket": "there is no such bucket; check data.cache and AWS_ENDPOINT_URL",
    "NoSuchKey": _NO_OBJECT,
    "404": _NO_OBJECT,
    "416": "it ends too early: upload it again",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
}
_BROKEN = {  # obstore's kinds of connection errors
    "Connect": "no connection",
    "Timeout": f"no answer for {_STALL_S} s",
    "Interrupted": "a truncated answer",
    "Request": "the connection was closed",
}


@dataclass(frozen=True)
class ByteRange:
    """Bytes start..stop-1 of an object with a total of `size` bytes."""

    name: str
    start: int
    stop: int
    size: int


class ObjectStore:
    """The objects below a URL. Thread safe. Refuses a process that was forked from a reading one."""

    def __init__(self, url: str, *, retries: int):
        """retries: number of retries of a request."""
        self.url, self._retries = url.rstrip("/"), retries
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        try:
            self._connection = _connection()
        except CacheError as error:
            raise CacheError(f"{self.url}: {error}") from None
        self._bucket = self._connection.bucket(bucket)

    def whole(self, name: str, *, limit: int) -> bytes:
        """An object; CacheError if it has more than `limit` bytes."""

        def get() -> bytes:
            # asked for as a range: only such an answer says the size of the object beside its own, which may be cut
            answer = self._bucket.get(self._prefix + name, options={"range": (0, limit)})
            size = answer.meta["size"]
            if size > limit:
                raise CacheError(f"{self.url}/{name}: it has more than {limit} bytes")
            return bytes(_whole_answer(answer.bytes(), length=size))

        return self._tried(name, get)

    def ranges(self, wanted: Sequence[ByteRange], then: Callable[[ByteRange, memoryview], T]) -> list[T]:
        """Request all ranges together, and call `then` on each answer in a thread, as soon as it arrives.

        Returns the results of `then`. Raises CacheError for an object of another size. All threads have ended when it
        returns or raises.
        """

        def get(one: ByteRange) -> memoryview:
            answer = self._bucket.get(self._prefix + one.name, options={"range": (one.start, one.stop)})
            self.refuse_size(one.name, answer.meta["size"], expected=one.size)
            return _whole_answer(answer.bytes(), length=one.stop - one.start)

        def work(one: ByteRange) -> T:
            return then(one, self._tried(one.name, partial(get, one)))

        self._connection.refuse_forked(self.url)
        answers = [self._connection.threads.submit(work, one) for one in wanted]
        wait(answers)
        return [answer.result() for answer in answers]

    def pieces(self, name: str, size: int) -> Iterator[memoryview]:
        """A whole object of this size from front to back; a few pieces are in memory at a time."""
        starts = range(0, size, _PIECE)
        for first in range(0, len(starts), _PIECES):
            asked = starts[first : first + _PIECES]
            parts = [ByteRange(name, start, min(start + _PIECE, size), size) for start in asked]
            yield from self.ranges(parts, lambda _, content: content)

    def sizes(self) -> dict[str, int]:
        """Bytes of every object below the URL, by name."""
        start = self._prefix

        def ask() -> dict[str, int]:
            pages = self._bucket.list(start or None)
            return {entry["path"].removeprefix(start): entry["size"] for page in pages for entry in page}

        return self._tried("", ask)

    def refuse_size(self, name: str, size: int, *, expected: int) -> None:
        if size != expected:
            raise CacheError(
                f"{self.url}/{name}: {size} bytes, the manifest says {expected}: it is truncated, or of another "
                "cache; upload the whole cache again"
            )

    def _tried(self, name: str, ask: Callable[[], T]) -> T:
        from obstore.exceptions import BaseError

        self._connection.refuse_forked(self.url)
        where, pause, reason = f"{self.url}/{name}".rstrip("/"), _FIRST_WAIT_S, ""
        for attempt in range(self._retries + 1):
            if attempt:
                sleep(pause)
                pause = min(2 * pause, _LONGEST_WAIT_S)
            try:
                return ask()
            except (BaseError, OSError) as error:
                refused, reason = _judged(error)
                if refused:
                    raise CacheError(f"{where}: {reason}") from None
        times = f"tried {self._retries + 1} times" if self._retries else "data.retries is 0"
        raise CacheError(
            f"{where}: cannot be read ({reason}; {self._connection.server}); {times}: check the network and "
            "AWS_ENDPOINT_URL, or raise data.retries"
        )


class _Connection:
    """Server, region and credentials as botocore finds them, and the threads of all requests of this process."""

    def __init__(self) -> None:
        from botocore.exceptions import NoCredentialsError
        from botocore.session import get_session

        session = get_session()
        client = session.create_client("s3")
        self._endpoint, self._region = client.meta.endpoint_url, client.meta.region_name
        _ = urlsplit(self._endpoint).port  # ValueError for a port out of range
        self._in_host = (client.meta.config.s3 or {}).get("addressing_style") == "virtual"
        bundle = session.get_config_variable("ca_bundle")
        self._certificates = Path(bundle).read_bytes() if bundle else None
        self._held = session.get_credentials()
        if self._held is None:
            raise NoCredentialsError
        self._credentials()
        self.server = masked_uri(self._endpoint)
        self.threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="objects")
        self._process = os.getpid()

    def bucket(self, name: str) -> "S3Store":
        from obstore.store import S3Store

        scheme, _, host = self._endpoint.partition("://")
        endpoint = f"{scheme}://{name}.{host}" if self._in_host else self._endpoint
        client: ClientConfig = {
            "allow_http": scheme == "http",
            "connect_timeout": timedelta(seconds=_CONNECT_S),
            "read_timeout": timedelta(seconds=_STALL_S),
            "timeout": timedelta(days=1),  # for a whole answer; a slow answer is no error
        }
        if self._certificates is not None:
            client["root_certificate"] = self._certificates
        return S3Store(
            name,
            endpoint=endpoint,
            aws_endpoint_url_s3=endpoint,  # otherwise obstore reads it from the environment
            virtual_hosted_style_request=self._in_host,
            region=self._region,
            credential_provider=self._credentials,
            client_options=client,
            retry_config={"max_retries": 0},  # retried only by `_tried`
        )

    def _credentials(self) -> "S3Credential":
        held = self._held.get_frozen_credentials()
        return {
            "access_key_id": held.access_key,
            "secret_access_key": held.secret_key,
            "token": held.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=_CREDENTIALS_MIN),
        }

    def refuse_forked(self, url: str) -> None:
        """Raises CacheError in a forked process: it lacks obstore's threads, so a request would never end."""
        if os.getpid() != self._process:
            raise CacheError(f"{url}: this process was forked after its parent had read a store; use `spawn`")


@lru_cache(maxsize=1)
def _connection() -> _Connection:
    """The connection of this process. Raises CacheError for an unusable environment, ConfigError without obstore."""
    try:
        import obstore  # noqa: F401
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ConfigError("a cache at s3:// needs obstore: pip install 'flowmask[s3]'") from None
    try:
        return _Connection()
    except BotoCoreError as error:
        raise CacheError(f"no usable credentials ({type(error).__name__}); {_CREDENTIALS}") from None
    except OSError as error:
        raise CacheError(f"AWS_CA_BUNDLE cannot be read ({error}); give a file of certificates") from None
    except ValueError as error:  # of an endpoint, or of a value in AWS's own config
        raise CacheError(f"{masked_uri(str(error))}; check AWS_ENDPOINT_URL") from None


def hash_of(pieces: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of all pieces, one after another."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _whole_answer(content: Any, *, length: int) -> memoryview:
    if len(content) != length:
        raise OSError(f"an answer of {len(content)} bytes in place of {length}")
    return memoryview(content)


def _judged(error: Exception) -> tuple[bool, str]:
    """Whether a retry is useless, and the reason (with the fix if it is useless)."""
    said = str(error)  # one line, and below it the chain of causes
    status, code = _found(r"non-2xx status code: (\d+)", said), _found(r"<Code>(\w+)</Code>", said)
    answer = f"{status} {code}".strip()
    if status and (int(status) >= 500 or int(status) in _PASSING or code == "SlowDown"):
        return False, f"the server answers {answer}"
    if "redirect without LOCATION" in said:
        code = "PermanentRedirect"
    if known := _REFUSED.get(code) or _REFUSED.get(status):
        return True, known
    if status:
        return True, f"the server refuses it with {answer}; check the credentials: {_CREDENTIALS}"
    if name := _found(r"External AWS credential provider: (\w+)", said):
        return True, f"no usable credentials ({name}); {_CREDENTIALS}"
    cause = _found(r'(?s:.*)(?:message|error): "([^"\n]+)"', said)
    broken = _BROKEN.get(_found(r"HttpError \{\s+kind: (\w+)", said), masked_uri(said.partition("\n")[0])[:200])
    return False, f"{broken}: {cause}" if cause else broken


def _found(pattern: str, text: str) -> str:
    """The group of the pattern's first match; nothing if there is none."""
    found = re.search(pattern, text)
    return found[1] if found else ""
