"""Laws of views: independent draws, mirrored sentences in a mirrored view, and view e mod V in epoch e."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.build.sentences import encode_sentences
from flowmask.data_pipeline.cache.manifest import LONG_TEXT
from flowmask.data_pipeline.clip.clips import swap_sides
from flowmask.data_pipeline.read.epoch_plan import EpochPlan
from flowmask.data_pipeline.read.loader import Loader
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.sources import open_source
from flowmask.models.text import clean
from flowmask.models.weights.wan import WanFolder


def records(folder: Path):
    """(record, tensors) by (clip, view), as in the shards."""
    found = {}
    for shard in sorted((folder / "shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        for name in (n for n in content if n.endswith(".json")):
            meta = json.loads(content[name])
            tensors = load(content[name.removesuffix("json") + "safetensors"])
            found[meta["clip"], meta["view"]] = meta, tensors
    return found


@pytest.fixture(scope="module")
def three_views(make_config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("views") / "cache"
    build(make_config(out, cache={"views": 3}))
    return out


def test_a_view_is_the_same_whatever_number_of_views_there_is(cache, three_views):
    two, three = records(cache), records(three_views)
    assert {view for _, view in three} == {0, 1, 2} and set(two) < set(three)
    for place, (meta, tensors) in two.items():
        other, others = three[place]
        assert meta == other and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_views_of_a_clip_differ_in_frames_or_geometry(three_views):
    drawn = [
        {name: meta[name] for name in ("clip", "frame_ids", "resize", "crop", "size", "flip")}
        for meta, _ in records(three_views).values()
    ]
    assert len({json.dumps(one) for one in drawn}) > 0.9 * len(drawn)
    assert {one["flip"] for one in drawn} == {False, True}


def embedding(encoder, text, dtype):
    (found,) = encode_sentences(encoder, [text], dtype=dtype, together=1)
    return found[LONG_TEXT]


def test_a_mirrored_view_has_mirrored_sentences_with_embeddings_of_their_own(three_views, mevis, tiny_wan, make_config):
    encoder = WanFolder(tiny_wan).text_encoder(torch.float32)
    source = open_source(make_config(Path("unused")).sources)
    texts = {(v.video_id, e.exp_id): e.text for v in source.videos() for e in v.expressions}
    changed = 0
    for meta, tensors in records(three_views).values():
        for expression in meta["expressions"]:
            original = texts[meta["video_id"], expression["exp_id"]]
            mirrored = swap_sides(original) if meta["flip"] else original
            assert expression["text"] == clean(mirrored, lowercase=True)
            stored = tensors[f"text.{expression['text_id']}"]
            expected = embedding(encoder, expression["text"], stored.dtype)
            assert torch.equal(stored, expected)
            if mirrored != original:
                plain = embedding(encoder, clean(original, lowercase=True), stored.dtype)
                assert stored.shape != plain.shape or not torch.equal(stored, plain)
                changed += 1
    assert changed, "some sentence of a mirrored clip names a side"


@pytest.mark.parametrize("global_batch", [1, 7])
def test_epoch_e_trains_on_view_e_mod_v(three_views, global_batch):
    reader = CacheReader(three_views)
    plan = EpochPlan(reader.buckets, global_batch=global_batch, seed=2)
    seen: dict[int, list[tuple[int, str]]] = {}
    loader = Loader(reader, plan, rank=0, world_size=1, micro_batch=global_batch, needs=(), text_tokens=256, threads=0)
    with loader:
        for _ in range(plan.first_step(5)):
            (batch,) = next(loader)
            for example, epoch in zip(batch.example_ids.tolist(), batch.epochs.tolist(), strict=True):
                record = reader.record(example)
                place = int(reader.index[example]["expression"])
                assert record["view"] == epoch % 3
                seen.setdefault(epoch, []).append((record["clip"], record["expressions"][place]["exp_id"]))
    views = np.bincount(reader.index["view"])
    for epoch in range(4):
        assert len(set(seen[epoch])) == len(seen[epoch]), "each (clip, expression) once"
        carried = views[epoch % 3] - len(seen[epoch])
        assert 0 <= carried <= (global_batch - 1) * len(reader.buckets)
    reader.close()
