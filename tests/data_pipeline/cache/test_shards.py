"""Laws of the shards: any WebDataset reads them, their bytes depend on records alone, and they are whole or absent."""

import pytest
import torch

from flowmask.data_pipeline.cache.shards import ShardWriter, cache_file, tensor_ranges
from flowmask.models.errors import CacheError


def test_the_webdataset_library_reads_every_record(cache):
    import webdataset

    keys = []
    for shard in sorted((cache / "shards").glob("*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False).decode():
            keys.append(sample["__key__"])
            assert sample["json"]["expressions"] and len(sample["safetensors"]) > 1000
    assert len(keys) == len(set(keys)) > 5


def write(path):
    with cache_file(path) as file:
        writer = ShardWriter(file)
        tensors = {"b": torch.arange(6, dtype=torch.bfloat16), "a": torch.ones(2, 3)}
        place = writer.add("00000001_00", meta={"y": 1, "x": "é"}, tensors=tensors)
        return place, writer.close()


def test_equal_records_make_equal_bytes_and_the_places_are_right(tmp_path):
    place, (size, _) = write(tmp_path / "one.tar")
    write(tmp_path / "two.tar")
    content = (tmp_path / "one.tar").read_bytes()
    assert content == (tmp_path / "two.tar").read_bytes()
    assert len(content) == size
    offset, length = place.tensors["a"]
    assert content[offset : offset + length] == torch.ones(2, 3).numpy().tobytes()
    offset, length = place.json
    assert content[offset : offset + length].decode() == '{"x":"é","y":1}'


def test_a_file_that_fails_half_way_does_not_appear(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(RuntimeError), cache_file(tmp_path / "file") as file:
        file.write(b"half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(CacheError, match="cannot write"), cache_file(tmp_path / "absent" / "file"):
        pass


def test_tensor_ranges_are_those_of_the_library():
    from safetensors.torch import save

    content = save({"x": torch.arange(5), "y": torch.zeros(2, dtype=torch.bfloat16)})
    start, end = tensor_ranges(content)["x"]
    assert content[start:end] == torch.arange(5).numpy().tobytes()
