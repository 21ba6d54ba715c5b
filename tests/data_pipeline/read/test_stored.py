"""Laws of a cache in an object store: the batches of the folder, whatever the network does, and few bytes for them."""

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from object_store import BUCKET, ENVIRONMENT, Asked, Proxy, moto_process, own_connection, proxy_before, upload
from trials import SEED, TRIALS

from flowmask.data_pipeline.cache import objects
from flowmask.data_pipeline.check.verify_stored import verify_stored
from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read.batches import open_batches, open_reader, plan_for
from flowmask.data_pipeline.read.loader import Batch
from flowmask.data_pipeline.read.reader import NEEDS, CacheReader
from flowmask.data_pipeline.read.stored import Range, _checksum, joined
from flowmask.launch.config import validate
from flowmask.models.errors import CacheError, ConfigError

DRAWS = 4 * TRIALS

URL = f"s3://{BUCKET}/some/cache"
TEXT = 256


@pytest.fixture(scope="module")
def server(cache: Path) -> Iterator[int]:
    """The port of a server that holds the cache."""
    with moto_process() as port:
        assert upload(port, cache, "some/cache") == URL
        yield port


@pytest.fixture(scope="module")
def shared_proxy(server: int) -> Iterator[Proxy]:
    with proxy_before(server) as proxy, own_connection():
        yield proxy


@pytest.fixture
def proxy(shared_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The proxy to the server, without the records of other tests."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": shared_proxy.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "_FIRST_WAIT_S", 0.01)
    shared_proxy.reset()
    return shared_proxy


@pytest.fixture
def new_connection() -> Iterator[None]:
    """A new client during the test, for a test that changes the environment."""
    with own_connection():
        yield


def config(disk: Path, *, url: str = URL, **settings: object) -> LoaderConfig:
    return LoaderConfig.model_validate({"cache": url, "local_cache": disk, **settings})


def opened(disk: Path, *, check: bool = True, **settings: object) -> CacheReader:
    reader = open_reader(config(disk, **settings), check=check)
    assert isinstance(reader, CacheReader)
    return reader


def steps_of(data: LoaderConfig, count: int, *, start: int = 0, threads: int = 2, micro_batch: int = 2) -> list[Batch]:
    reader = open_reader(data)
    plan = plan_for(reader, global_batch=4, seed=3, remainder="carry")
    settings = {"rank": 0, "world_size": 1, "micro_batch": micro_batch, "needs": NEEDS, "text_tokens": TEXT}
    with open_batches(reader, plan, prefetch_batches=3, threads=threads, start_step=start, **settings) as batches:
        found = [batch for _ in range(count) for batch in next(batches)]
    reader.close()
    return found


def same(one: Batch, other: Batch) -> bool:
    tensors = (*sorted(NEEDS), "example_ids", "epochs", "positions")
    return (one.step, one.keys, one.digest) == (other.step, other.keys, other.digest) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def read(reader: CacheReader, ids: list[int] | None = None) -> list[dict[str, torch.Tensor]]:
    """Read examples one by one; all examples if `ids` is None."""
    numbers = range(reader.manifest.examples) if ids is None else ids
    return [reader.read(np.array([i]), needs=NEEDS, text_tokens=TEXT) for i in numbers]


def equal(found: list[dict[str, torch.Tensor]], cache: Path, ids: list[int] | None = None) -> bool:
    local = read(CacheReader(cache), ids)
    return all(torch.equal(a[name], b[name]) for a, b in zip(found, local, strict=True) for name in NEEDS)


def needed_bytes(cache: Path, ids: list[int]) -> int:
    """Bytes of all different ranges that the examples need."""
    reader = CacheReader(cache)
    ranges: set[tuple[int, int, int]] = set()
    for i in ids:
        row, size = reader.index[i], reader.dtype.itemsize
        latent = 16 * int(np.prod(reader.bucket_of(i).latent_shape)) * size
        shard, text = int(row["shard"]), int(row["text_tokens"]) * reader.manifest.text_dim * size
        ranges |= {(shard, int(row[name]), latent) for name in ("video_mean", "video_logvar", "mask_mean")}
        ranges |= {(shard, int(row["text"]), text), (shard, int(row["record"]), int(row["record_length"]))}
    return sum(length for _, _, length in ranges)


def asked_bytes(proxy: Proxy) -> int:
    return sum(one.range[1] - one.range[0] for one in proxy.ranges() if one.range is not None)


def test_the_batches_are_those_of_the_folder_from_any_step_with_any_disk(proxy: Proxy, cache: Path, tmp_path: Path):
    local = steps_of(LoaderConfig(cache=cache), 14)
    assert all(map(same, steps_of(config(tmp_path / "a"), 14), local))
    assert all(map(same, steps_of(config(tmp_path / "a"), 5, start=9), local[18:])), "a full disk"
    assert all(map(same, steps_of(config(tmp_path / "b"), 3, start=7), local[14:20])), "an empty one"
    tiny = config(tmp_path / "c", local_cache_gib=64 / (1 << 20))  # room for one example at most
    assert all(map(same, steps_of(tiny, 6, micro_batch=2), local[:12]))
    assert sum(path.stat().st_size for path in (tmp_path / "c").rglob("*") if path.name != "locks") <= 64 << 10


def test_a_mixture_and_single_records_may_be_in_a_store_too(proxy: Proxy, cache: Path, tmp_path: Path) -> None:
    assert opened(tmp_path).record(3) == CacheReader(cache).record(3)
    assert opened(tmp_path).sentence(3) == CacheReader(cache).sentence(3)
    mixed = LoaderConfig.model_validate({"mix": [{"cache": cache}, {"cache": URL}], "local_cache": tmp_path})
    with pytest.raises(CacheError, match=rf"data\.mix: {URL} holds the same cache as {cache}"):
        open_reader(mixed)


def unlucky(seed: int) -> Callable[[Asked], str | int | None]:
    """Each request fails up to two times, in any way, before it is answered."""
    draw, left = random.Random(seed), dict[Asked, int]()

    def fault(asked: Asked) -> str | int | None:
        kind = draw.choice(["cut", "reset", "short", "delay", 500, 503])
        if left.setdefault(asked, draw.randrange(3)) == 0:
            return None
        left[asked] -= 1
        return kind

    return fault


@pytest.mark.parametrize("trial", range(DRAWS))
def test_a_server_that_delays_cuts_and_fails_changes_no_byte(proxy: Proxy, cache: Path, tmp_path: Path, trial: int):
    proxy.fault, proxy.delay_s = unlucky(SEED + trial), 0.001
    assert all(map(same, steps_of(config(tmp_path, retries=2), 5), steps_of(LoaderConfig(cache=cache), 5)))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut", "a truncated answer"),
        ("reset", "the connection was closed"),
        ("short", "an answer of"),
        (500, "the server answers 500"),
        (503, "the server answers 503 SlowDown"),
    ],
)
def test_past_the_retries_one_line_names_the_object_and_the_fix(
    proxy: Proxy, tmp_path: Path, kind: str | int, said: str
) -> None:
    reader = opened(tmp_path, retries=1)
    proxy.reset()
    proxy.fault = lambda _: kind
    from_where = rf"; {proxy.url}\); tried 2 times: .*data\.retries$"
    fails = rf": cannot be read \({said}.*{from_where}"
    with pytest.raises(CacheError, match=rf"{URL}/shards/\d{{6}}\.tar{fails}"):
        read(reader, [0])
    with pytest.raises(CacheError, match=rf"{URL}/manifest\.json{fails}"):
        opened(tmp_path, retries=1)
    assert set(Counter(proxy.asked).values()) == {2}
    proxy.reset()
    read(reader, [0])  # the failure has no effect any more


def test_what_can_not_pass_is_said_at_once(proxy: Proxy, cache: Path, tmp_path: Path) -> None:
    for url, said in (
        ("s3://nobodys-bucket/x", "there is no such bucket; check data.cache and AWS_ENDPOINT_URL"),
        (f"s3://{BUCKET}/other", "manifest.json: there is no such object; check data.cache"),
    ):
        with pytest.raises(CacheError, match=said):
            opened(tmp_path, url=url)
    assert len(proxy.asked) == 2
    for fault, said in (
        (403, r"refuses it with 403; check the credentials: export AWS_ACCESS_KEY_ID"),
        (301, "the bucket is in another region; export AWS_DEFAULT_REGION"),
        (416, "it ends too early: upload it again"),
    ):
        proxy.reset()
        proxy.fault = lambda _, fault=fault: fault
        with pytest.raises(CacheError, match=said):
            opened(tmp_path)
        assert len(proxy.asked) == 1


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no usable credentials .*; export AWS_ACCESS_"),
        ({"AWS_PROFILE": "nobody"}, r"no usable credentials \(ProfileNotFound\); export"),
        ({"AWS_ENDPOINT_URL": "not a url"}, "Invalid endpoint.*; check AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"}, "Port out of range.*; check AWS_ENDPOINT_URL"),
        ({"AWS_CA_BUNDLE": "/no/such.pem"}, "AWS_CA_BUNDLE cannot be read .*; give a file of certificates"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, r"cannot be read \(.*127\.0\.0\.1:9.*\); tried 2 times:"),
        ({"AWS_ENDPOINT_URL": "http://me:hidden@127.0.0.1:9"}, r"cannot be read \(.*\); tried 2 times: check the"),
    ],
)
@pytest.mark.usefixtures("new_connection", "proxy")
def test_a_wrong_environment_is_one_line_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(CacheError, match=rf"^{URL}.*{said}") as raised:
        opened(tmp_path, retries=1)
    assert "hidden" not in str(raised.value) and ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in str(raised.value)


@pytest.mark.usefixtures("new_connection", "proxy")
@pytest.mark.parametrize("style", ["path", "virtual"])
def test_server_region_and_keys_are_those_of_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    (tmp_path / "config").write_text(
        "[profile other]\nregion = eu-central-1\nendpoint_url = https://minio.test:9000\n"
        "aws_access_key_id = of-profile\naws_secret_access_key = s\naws_session_token = t\n"
        f"s3 =\n  addressing_style = {style}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    store = objects._connection().bucket(BUCKET)
    assert store.config["region"] == "eu-central-1" and store.credential_provider is not None
    assert store.config["endpoint"] == f"https://{BUCKET + '.' if style == 'virtual' else ''}minio.test:9000"
    keys = store.credential_provider()
    assert (keys["access_key_id"], keys["secret_access_key"], keys["token"]) == ("of-profile", "s", "t")


def test_a_forked_process_is_refused_and_does_not_wait_without_end(proxy: Proxy, cache: Path, tmp_path: Path) -> None:
    reader = opened(tmp_path)
    child = os.fork()
    if not child:
        try:
            read(reader, [0])
        except CacheError as error:
            os._exit(7 if "forked" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert equal(read(reader, [0]), cache, [0])


@pytest.mark.parametrize("trial", range(10 * DRAWS))
def test_a_checksum_sees_a_changed_lost_added_and_moved_part(trial: int) -> None:
    draw = random.Random(SEED + trial)
    blocks = [draw.randbytes(4096) for _ in range(draw.randrange(2, 6))]
    content = b"".join(blocks) + draw.randbytes(draw.randrange(4096))
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    lost = content[: draw.randrange(len(content))]
    zeros = bytes(4096) + content[4096:]
    moved = b"".join(reversed(blocks)) + content[4096 * len(blocks) :]
    found = [_checksum(memoryview(bytes(one))) for one in (changed, lost, content + b"\0", zeros, moved)]
    assert _checksum(memoryview(content)) not in found
    assert _checksum(memoryview(b"x" + content)[1:]) == _checksum(memoryview(content)), "wherever it lies in memory"


@pytest.mark.usefixtures("new_connection")
def test_without_obstore_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"needs obstore: pip install 'flowmask\[s3\]'"):
        opened(tmp_path)


@pytest.fixture
def spoiled(proxy: Proxy, server: int, cache: Path, tmp_path: Path) -> Callable[[str, bytes], str]:
    """Uploads the cache again, with one file of other content; returns the URL."""

    def upload_with(name: str, content: bytes) -> str:
        shutil.copytree(cache, tmp_path / "spoiled")
        (tmp_path / "spoiled" / name).write_bytes(content)
        return upload(server, tmp_path / "spoiled", f"spoiled/{tmp_path.name}")

    return upload_with


def test_an_object_of_another_size_is_refused_at_the_start_and_when_first_read(
    spoiled: Callable[[str, bytes], str], cache: Path, tmp_path: Path
) -> None:
    content = (cache / "shards/000000.tar").read_bytes()
    url = spoiled("shards/000000.tar", content + bytes(10))
    said = rf"shards/000000\.tar: {len(content) + 10} bytes, the manifest says {len(content)}"
    with pytest.raises(CacheError, match=said):
        opened(tmp_path / "disk", url=url)
    reader = opened(tmp_path / "disk", url=url, check=False)
    first = np.flatnonzero(reader.index["shard"] == 0)[:1]
    with pytest.raises(CacheError, match=said):
        read(reader, first.tolist())


def test_an_index_that_is_not_the_manifests_is_refused(
    spoiled: Callable[[str, bytes], str], cache: Path, tmp_path: Path
) -> None:
    content = bytearray((cache / "index.npy").read_bytes())
    content[-40] ^= 1
    url = spoiled("index.npy", bytes(content))
    with pytest.raises(CacheError, match=r"index\.npy: the index is damaged: its SHA-256 is not that of the manifest"):
        opened(tmp_path / "disk", url=url)


def test_verify_names_each_object_that_is_not_as_it_was_written(
    spoiled: Callable[[str, bytes], str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_PIECE", 1000)  # many pieces, the last one shorter
    whole = verify_stored(URL)
    assert whole.ok and whole.examples == CacheReader(cache).manifest.examples and whole.shards and whole.records
    content = bytearray((cache / "shards/000001.tar").read_bytes())
    content[len(content) // 2] ^= 1
    report = verify_stored(spoiled("shards/000001.tar", bytes(content)))
    assert [(str(problem.file), problem.reason[:11]) for problem in report.problems] == [
        ("shards/000001.tar", "its SHA-256")
    ]
    assert report.verdict("s3://x") == "1 wrong: upload these again"
    with pytest.raises(CacheError, match="there is no such object"):
        verify_stored(f"s3://{BUCKET}/other")
    with pytest.raises(ConfigError, match=r"the cache is https://\*\*\*@host/x; give a folder or s3://"):
        verify_stored("https://me:hidden@host/x")


@pytest.mark.parametrize("trial", range(DRAWS))
def test_what_is_damaged_on_the_disk_is_found_and_fetched_again(
    proxy: Proxy, cache: Path, tmp_path: Path, trial: int
) -> None:
    draw = random.Random(SEED + trial)
    assert equal(read(opened(tmp_path)), cache)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.name != "locks")
    index = next(path for path in files if path.suffix == ".npy")
    for path in {index, *draw.sample(files, len(files) // 4)}:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(draw.choice([content, content[: draw.randrange(len(content))], content + b"x", b""]))
    proxy.reset()
    assert equal(read(opened(tmp_path, check=False)), cache)
    assert Counter(one.path.rpartition("/")[2] for one in proxy.asked)["index.npy"] == 1
    assert proxy.ranges()
    proxy.reset()
    assert equal(read(opened(tmp_path, check=False)), cache)
    assert [one.path.rpartition("/")[2] for one in proxy.asked] == ["manifest.json"], "all else is on the disk"


def test_a_batch_asks_for_little_more_than_it_needs_and_for_all_of_it_together(
    proxy: Proxy, cache: Path, tmp_path: Path
) -> None:
    reader, local = opened(tmp_path), CacheReader(cache)
    ids = [i for i in range(local.manifest.examples) if local.bucket_of(i) == local.bucket_of(0)][::2]
    proxy.reset()
    reader.read(np.array(ids), needs=NEEDS, text_tokens=TEXT)
    assert needed_bytes(cache, ids) <= asked_bytes(proxy) <= needed_bytes(cache, ids) * 4 / 3
    assert set(Counter(proxy.asked).values()) == {1} and len(proxy.asked) < 4 * len(ids)
    asked, again = len(proxy.asked), opened(tmp_path / "other")
    proxy.reset()
    proxy.gate = asked
    again.read(np.array(ids), needs=NEEDS, text_tokens=TEXT)
    assert proxy.most_together == asked, "none was answered before all were asked"


@pytest.mark.parametrize("trial", range(10 * DRAWS))
def test_joined_requests_hold_all_ranges_and_are_at_most_a_quarter_waste(trial: int) -> None:
    draw = random.Random(SEED + trial)
    ranges: dict[Range, None] = {}
    for shard in range(draw.randrange(1, 4)):
        at = 0
        for _ in range(draw.randrange(1, 40)):
            at += draw.choice([0, 1, 50, 5000, 10**7])
            length = draw.choice([1, 10, 1000, 10**6])
            ranges[shard, at, length] = None
            at += draw.choice([0, length, length])  # some ranges overlap
    requests = list(joined(ranges))
    assert sorted(one for request in requests for one in request.ranges) == sorted(ranges)
    for request in requests:
        covered = {(max(start, request.start), start + length) for _, start, length in request.ranges}
        assert min(covered)[0] == request.start and max(stop for _, stop in covered) == request.stop
        assert len(request.ranges) == 1 or request.stop - request.start <= 8 << 20
    distinct = sum(length for _, _, length in ranges)
    assert sum(request.stop - request.start for request in requests) <= distinct * 4 / 3


def test_processes_of_a_node_fetch_each_range_once(proxy: Proxy, cache: Path, tmp_path: Path) -> None:
    proxy.delay_s = 0.05
    code = (
        "import sys, numpy; from pathlib import Path; from flowmask.data_pipeline.read.stored import StoredFiles\n"
        f"files = StoredFiles({URL!r}, local=Path(sys.argv[1]), local_gib=1, retries=0)\n"
        "index = files.index(check=False)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for row in index:\n"
        "    size = int(row['text_tokens']) * files.manifest.text_dim * 2\n"
        "    places = [(int(row['text']), size), (int(row['record']), int(row['record_length']))]\n"
        "    parts = [(start, memoryview(bytearray(size))) for start, size in places]\n"
        "    files.read([(int(row['shard']), parts)])\n"
        "    print(sum(map(sum, (bytes(part) for _, part in parts))))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    printed = [one.communicate()[0] for one in both]
    assert [one.returncode for one in both] == [0, 0] and printed[0] == printed[1] != ""
    assert set(Counter(proxy.ranges()).values()) == {1}
    assert Counter(one.path.rpartition("/")[2] for one in proxy.asked)["index.npy"] == 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"cache": URL}, r"data\.cache is s3://caches/some/cache, which needs data\.local_cache: a folder on a disk"),
        ({"cache": "https://host/cache", "local_cache": "d"}, "is https://host/cache; give a folder or s3://"),
        ({"cache": "s3://me:hidden@bucket/x", "local_cache": "d"}, r"is s3://\*\*\*@bucket/x; give a folder"),
        ({"mix": [{"cache": "a"}, {"cache": "pipe:cat x"}]}, r"data\.mix\.cache is pipe:cat x; give a folder or s3://"),
    ],
)
def test_a_url_that_can_not_be_read_by_its_index_is_refused_by_the_config(data: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        validate(data, LoaderConfig, origin="a config")
    assert "hidden" not in str(raised.value)
