"""Laws of streaming: the bytes of the shards over HTTP, each example once an epoch, a resume at the right place."""

import shutil
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import numpy as np
import pytest
import torch
from seals import rewrite

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.cache.manifest import Manifest, read_manifest
from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read.batches import open_batches, open_reader, plan_for
from flowmask.data_pipeline.read.reader import NEEDS, CacheReader
from flowmask.data_pipeline.read.stream_plan import EPOCH, ID, SHARD, StreamPlan
from flowmask.models.errors import CacheError, ConfigError


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, counts requests, and hangs up after `limit` bytes of a tar."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked[self.path] += 1
        super().do_GET()

    def copyfile(self, source, outputfile):
        limit = self.server.limit
        if limit is None or not self.path.endswith(".tar"):
            return super().copyfile(source, outputfile)
        outputfile.write(source.read(limit))
        self.close_connection = True
        return None


@pytest.fixture
def server(cache):
    """A local web server with the cache: `.url`, `.asked`, `.limit`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(cache)))
    server.asked, server.limit = Counter(), None
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def batches_of(url, *, rank=0, world_size=1, micro_batch=1, start_step=0, needs=NEEDS, threads=2, **config):
    config = {"retries": 0, "shuffle_examples": 12, "mode": "stream"} | config
    reader = open_reader(LoaderConfig(cache=str(url), **config))
    plan = plan_for(reader, global_batch=4, seed=3, remainder="carry")
    return open_batches(
        reader,
        plan,
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        needs=needs,
        text_tokens=256,
        threads=threads,
        start_step=start_step,
        prefetch_batches=4,
    )


def steps_of(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


def same(one, other):
    tensors = (*sorted(NEEDS), "example_ids", "epochs", "positions")
    return (one.step, one.keys, one.digest) == (other.step, other.keys, other.digest) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def test_a_stream_over_http_gives_what_reading_the_folder_gives(server, cache):
    reader = CacheReader(cache)
    for (batch,) in steps_of(batches_of(server.url, micro_batch=4), 25):
        read = reader.read(batch.example_ids.numpy(), needs=NEEDS, text_tokens=256)
        assert all(torch.equal(getattr(batch, name), read[name]) for name in NEEDS)
        views = reader.index[batch.example_ids.numpy()]["view"]
        assert (views == batch.epochs.numpy() % 2).all(), "epoch e is of view e mod V"
    assert not any(path.endswith("index.npy") for path in server.asked)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_the_folder_itself_and_any_number_of_threads_give_the_same_stream(server, cache, threads):
    there = steps_of(batches_of(server.url), 6)
    pairs = zip(there, steps_of(batches_of(cache, threads=threads), 6), strict=True)
    assert all(same(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))
    placed = steps_of(batches_of(f"pipe:cat {cache}/{{}}"), 1)
    assert all(same(a, b) for a, b in zip(there[0], placed[0], strict=True))


def test_a_sentence_cut_before_the_encoder_is_streamed_where_the_trained_length_is_short(server, cache):
    reader = CacheReader(cache)
    loader = batches_of(server.url, needs={"text"})
    loader.text_tokens = 64
    long = set(np.flatnonzero(reader.index["short_text_tokens"]).tolist())
    seen = 0
    for batches in steps_of(loader, 12):
        for batch in batches:
            expected = reader.read(batch.example_ids.numpy(), needs={"text"}, text_tokens=64)["text"]
            assert torch.equal(batch.text, expected)
            seen += int(batch.example_ids[0]) in long
    assert seen


@pytest.mark.parametrize("step", [1, 5, 9, 17])
def test_a_stream_starts_at_any_step_as_if_it_had_never_stopped(server, step):
    whole = steps_of(batches_of(server.url, micro_batch=2), 20)
    server.asked.clear()
    rest = steps_of(batches_of(server.url, micro_batch=2, start_step=step), 20 - step)
    for one, other in zip(whole[step:], rest, strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))


def test_resume_leaves_the_shards_of_finished_windows_alone(server, cache):
    """A stream with windows of one shard that starts in window n requests no earlier shard."""
    shards = [f"/shards/{entry.file}" for entry in read_manifest(cache).shards]
    loader = batches_of(server.url, shuffle_examples=1, start_step=5)
    order = [list(w.wanted()) for w in islice(loader.plan.windows(5), 2)]
    steps_of(loader, 1)
    needed = {shards[shard] for window in order for shard in window}
    asked = {path for path in server.asked if path.endswith(".tar")}
    assert asked <= needed | {shards[s] for w in islice(loader.plan.windows(5), 4) for s in w.wanted()}
    assert order != [list(w.wanted()) for w in islice(loader.plan.windows(0), 2)]


def test_a_server_that_dies_in_the_middle_of_a_shard_is_one_line_that_names_it(server):
    for limit in (700, 20_000, 512, 0):
        server.limit = limit
        with pytest.raises(CacheError, match=r"shards/\d{6}\.tar: cannot be read to its end") as raised:
            steps_of(batches_of(server.url), 20)
        assert "\n" not in str(raised.value)


def test_a_shard_that_is_fetched_again_loses_and_repeats_nothing(server):
    """The server hangs up once, in the middle of the first tar."""
    expected = steps_of(batches_of(server.url), 10)
    server.limit, original = 15_000, Handler.copyfile

    def once(handler, source, outputfile):
        original(handler, source, outputfile)
        if handler.path.endswith(".tar"):
            handler.server.limit = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "copyfile", once)
        patch.setattr("flowmask.data_pipeline.read.stream.sleep", lambda _: None)
        again = steps_of(batches_of(server.url, retries=2), 10)
    assert all(same(a, b) for one, other in zip(expected, again, strict=True) for a, b in zip(one, other))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{url}/nothing", "manifest.json: no cache can be read there"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9/manifest.json: no cache can be read there"),
        ("{url}/shards", "manifest.json: no cache can be read there"),
        ("/no/such/folder", "/no/such/folder/manifest.json: no cache can be read there"),
    ],
)
def test_a_url_without_a_cache_is_one_line(server, place, said):
    with pytest.raises(CacheError, match=said) as raised:
        batches_of(place.format(url=server.url))
    assert "\n" not in str(raised.value)


def test_what_a_stream_cannot_do_is_refused_by_name(cache, server):
    with pytest.raises(ValueError, match=r"data\.mode=stream"):
        LoaderConfig(cache="http://somewhere/cache")
    with pytest.raises(ValueError, match=r"data\.remainder is drop"):
        LoaderConfig(cache=cache, mode="stream", remainder="drop")
    with pytest.raises(ConfigError, match=r"model\.text_tokens is 32"):
        open_batches(
            reader := open_reader(LoaderConfig(cache=server.url, mode="stream")),
            plan_for(reader, global_batch=4, seed=0, remainder="carry"),
            rank=0,
            world_size=1,
            micro_batch=1,
            needs={"text"},
            text_tokens=32,
            prefetch_batches=1,
        )
    with pytest.raises(ConfigError, match="a multiple of"):
        batches_of(server.url, micro_batch=3)


def test_what_changed_behind_the_manifest_is_an_error_never_other_examples(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    shards = sorted((tmp_path / "cache/shards").glob("*.tar"))
    shards[0].write_bytes(shards[0].read_bytes()[: shards[0].stat().st_size // 2])
    with pytest.raises(CacheError, match=r"000000\.tar: cannot be read to its end"):
        steps_of(batches_of(tmp_path / "cache"), 40)


@pytest.mark.parametrize("pattern", ["pipe:cat {place}/{{}}", 'pipe:cat "{place}/{{}}"', "{place}"])
@pytest.mark.parametrize(
    "name", ["000000.tar; touch X", "000000.tar$(touch X)", "'$(touch X)'", "../../o/shards/000000.tar"]
)
def test_no_name_in_a_manifest_reaches_a_shell_or_another_folder(cache, tmp_path, monkeypatch, pattern, name):
    shutil.copytree(cache, tmp_path / "o")
    copy = shutil.copytree(cache, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rewrite(copy / "manifest.json", lambda manifest: manifest["shards"][0].update(file=name))
    with pytest.raises(CacheError, match=r"shards\.0\.file"):
        steps_of(batches_of(pattern.format(place=copy)), 40)
    assert not (tmp_path / "X").exists()


def manifest_of(counts, views, *, like):
    """A manifest with these examples (shard x bucket) and the view of each shard."""
    counts, views = np.array(counts), np.array(views)
    count = views.max() + 1
    shards, buckets, first = [], [], 0
    for s, row in enumerate(counts):
        entry = like.shards[0].model_copy(update={"examples": row.tolist(), "view": int(views[s])})
        shards.append(entry)
    for b in range(counts.shape[1]):
        examples = [int(counts[views == v, b].sum()) for v in range(count)]
        firsts = [first + sum(examples[:v]) for v in range(count)]
        buckets.append(like.buckets[0].model_copy(update={"first": firsts, "examples": examples}))
        first += sum(examples)
    update = {"shards": shards, "buckets": buckets, "views": int(count), "examples": first}
    return like.model_copy(update=update)


def plan_of(manifest: Manifest, *, rank, world_size, micro_batch, window, global_batch=12, seed=1):
    plan = StreamPlan(manifest, global_batch=global_batch, seed=seed, shuffle_examples=window)
    return plan.share(rank=rank, world_size=world_size, micro_batch=micro_batch)


@pytest.mark.parametrize("seed", range(6))
def test_every_example_comes_exactly_once_an_epoch_over_all_ranks(cache, seed):
    """Random caches with empty shards, several views and buckets; any number of ranks and any window."""
    random = np.random.default_rng(seed)
    views, shards, buckets = (int(random.integers(1, 4)), int(random.integers(3, 20)), int(random.integers(1, 5)))
    counts = random.integers(0, 9, (shards, buckets)) * (random.random((shards, 1)) < 0.8)
    counts[0, 0] += 1
    order = np.sort(np.arange(shards) % views)
    manifest = manifest_of(counts, order, like=read_manifest(cache))
    world_size, micro_batch = int(random.choice([1, 2, 3, 4])), int(random.choice([1, 3]))
    window = int(random.integers(1, 40))
    seen: dict[int, Counter[int]] = {}
    lowest = []
    for rank in range(world_size):
        plan = plan_of(
            manifest,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            window=window,
            global_batch=36,
            seed=seed,
        )
        waiting = Counter[int]()
        for part in islice(plan.windows(), 120):
            for bucket, items in part.batches:
                assert len(items) == micro_batch
                views_of = items[:, EPOCH] % views
                entry = manifest.buckets[bucket]
                low = np.array(entry.first)[views_of]
                assert ((low <= items[:, ID]) & (items[:, ID] < low + np.array(entry.examples)[views_of])).all()
                for number, epoch in items[:, :2].tolist():
                    seen.setdefault(epoch, Counter())[number] += 1
            waiting = Counter(part.carried[:, EPOCH].tolist())
            last = part
        reached = [int(e) for e in last.batches[-1][1][:, EPOCH]] + list(waiting)
        lowest.append(min(reached))
    for epoch in range(min(lowest) - 1):
        entries = [(b.first[epoch % views], b.examples[epoch % views]) for b in manifest.buckets]
        expected = {number for first, count in entries for number in range(first, first + count)}
        assert seen.get(epoch, Counter()) == Counter(expected)
    assert min(lowest) > 2


def test_a_window_mixes_shards_and_ranks_share_no_shard_of_an_epoch(cache):
    counts = np.full((64, 2), 10)
    manifest = manifest_of(counts, np.zeros(64, int), like=read_manifest(cache))
    taken = []
    for rank in range(4):
        plan = plan_of(manifest, rank=rank, world_size=4, micro_batch=1, window=80)
        parts = list(islice(plan.windows(), 4))
        taken += [{s for part in parts for _, items in part.batches for s in items[:, SHARD].tolist()}]
        assert all(len(part.batches) == 80 and len(part.wanted()) == 4 for part in parts)
        firsts = [items[0, SHARD] for _, items in parts[0].batches[:20]]
        assert len(set(firsts)) > 2
    assert sum(len(some) for some in taken) == len(set.union(*taken)) == 64


def test_the_plan_of_a_step_is_what_the_loader_gives_and_progress_counts_epochs(server):
    loader = batches_of(server.url, micro_batch=2)
    for step, batches in enumerate(steps_of(loader, 12)):
        planned = loader.plan[step]
        assert planned.example_ids.tolist() == [i for batch in batches for i in batch.example_ids.tolist()]
    assert loader.plan[3].step == 3, "asking back is allowed"
    examples = loader.reader.manifest.examples
    assert loader.plan.progress(0) == 0 and loader.plan.progress(examples) == pytest.approx(8)
    assert isinstance(loader.reader.buckets[0], Bucket)


def test_a_manifest_that_does_not_say_what_a_shard_holds_is_refused(cache):
    manifest = read_manifest(cache)
    old = manifest.model_copy(update={"shards": [s.model_copy(update={"examples": []}) for s in manifest.shards]})
    with pytest.raises(CacheError, match="build it again"):
        StreamPlan(old, global_batch=1, seed=0, shuffle_examples=1)
