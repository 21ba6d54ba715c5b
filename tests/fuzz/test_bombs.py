"""Small files that ask for a lot of memory or time: the answer is one line at once, in little memory."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from limits import bounded
from torch import Tensor

from flowmask.data_pipeline.cache.shards import tar_records, tensor_ranges
from flowmask.data_pipeline.formats.json_members import Places, members
from flowmask.data_pipeline.formats.plain_pickle import read_plain_pickle
from flowmask.launch.config import load_job
from flowmask.launch.jobs import TrainJob
from flowmask.launch.slurm.submission import Submission
from flowmask.launch.watch.runs import look_at_all
from flowmask.models.errors import ConfigError, UserError, WeightsError
from flowmask.models.files import read_object
from flowmask.models.stored.sealed import parse_json
from flowmask.models.stored.typed import read_yaml
from flowmask.models.weights.flowrvs import load_dit, load_mask_decoder
from flowmask.models.weights.wan import WanFolder


def doubled(times: int) -> bytes:
    """A pickle of a list that names one list twice, and so on `times` times."""
    value: list[Any] = []
    for _ in range(times):
        value = [value, value]
    return pickle.dumps(value)


PICKLES = {
    "a list of 2^40": doubled(40),
    "a list of 2^300": doubled(300),
    "a place of 2^31 in the memo": b"\x80\x04]r\xff\xff\xff\x7f.",
    "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"a.",
    "a string of 2^31": b"\x80\x04X" + struct.pack("<I", (1 << 31) - 1) + b"a.",
    "a frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"].",
    "100,000 lists in each other": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a function": b"cos\nsystem\n(S'true'\ntR.",
    "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
}


HARMLESS = ("100,000 lists in each other", "a place of 2^31 in the memo")  # as large as their bytes say


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_asks_for_much_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(PICKLES[name])
    with bounded(path.stat().st_size):
        if name in HARMLESS:
            read_plain_pickle(path)
            return
        with pytest.raises(UserError) as raised:
            read_plain_pickle(path)
    assert "\n" not in str(raised.value)


def small_dit() -> dict[str, Tensor]:
    return {"blocks.99999999.x": torch.zeros(1), "patch_embedding.weight": torch.zeros(4, 16, 1, 2, 2)}


def packed(path: Path, content: Any) -> None:
    """A .pth file as torch writes it, but deflated: zeros take no space."""
    plain = io.BytesIO()
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))


def settings_that_double(path: Path) -> None:
    value: list[Any] = []
    for _ in range(40):
        value = [value, value]
    torch.save({"model": {"vae.decoder.conv_out.weight": torch.zeros(1, 2)}, "flowmask": {"a": value}}, path)


WEIGHTS: dict[str, Callable[[Path], None]] = {
    "block 99999999": lambda path: torch.save({"model": small_dit()}, path),
    "a block of 5000 digits": lambda path: torch.save({"model": {f"blocks.{'9' * 5000}.x": torch.zeros(1)}}, path),
    "one number a billion times": lambda path: torch.save(
        {"model": {"vae.decoder.conv_out.weight": torch.zeros(1).expand(1, 10**12)}}, path
    ),
    "an archive that unpacks to more": lambda path: packed(
        path, {"model": {"vae.decoder.conv_out.weight": torch.zeros(1, 10**8)}}
    ),
    "settings that name a list 2^40 times": settings_that_double,
    "no weights": lambda path: torch.save({"model": {7: torch.zeros(1)}}, path),
    "a weight that is a number": lambda path: torch.save({"vae.decoder.conv_out.weight": torch.tensor(1.0)}, path),
    "a sparse weight": lambda path: torch.save({"model": {"vae.encoder.x": torch.zeros(9).to_sparse()}}, path),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_ask_for_much_are_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.pth"
    WEIGHTS[name](path)
    for load in (lambda: load_dit(path, ema=False), lambda: load_mask_decoder(path)):
        with bounded(path.stat().st_size), pytest.raises(WeightsError) as raised:
            load()
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 2000


@pytest.mark.parametrize("key", ["num_layers", "ffn_dim", "attention_head_dim", "num_attention_heads"])
def test_a_wan_folder_that_says_it_is_huge_is_one_line(tmp_path: Path, key: str) -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 1, key: 10**9}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps(config))
    with bounded(100), pytest.raises(WeightsError, match=f"{key} is {10**9}"):
        WanFolder(tmp_path).empty_transformer(video_injection=True)


def member(name: str, **facts: Any) -> bytes:
    info = tarfile.TarInfo(name)
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info.tobuf(tarfile.GNU_FORMAT)


TARS = {
    "a member of 2^60 bytes": member("0.json", size=1 << 60),
    "a member of less than nothing": member("0.json", size=-1024),
    "a link": member("0.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a sparse member": member("0.json", type=tarfile.GNUTYPE_SPARSE, size=512),
    "a device": member("0.json", type=tarfile.CHRTYPE),
    "a long name": member("0.json", type=tarfile.GNUTYPE_LONGNAME, size=1 << 40),
    "another format's header": member("x", type=tarfile.XHDTYPE, size=20) + b"20 size=-100000000\n".ljust(512, b"\0"),
    "no header": b"\1" * 512,
    "nothing": b"",
}


@pytest.mark.parametrize("name", TARS)
def test_a_shard_holds_what_our_writer_makes_and_nothing_else(name: str) -> None:
    content = TARS[name]
    with bounded(len(content)), pytest.raises(ValueError) as raised:
        list(tar_records(io.BytesIO(content + bytes(1024) if content else b""), size=10_000))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "header",
    [
        b"{}" * 0,
        b'{"a":{"data_offsets":[0,1e300]}}',
        b'{"a":{"data_offsets":[-9,4]}}',
        b'{"a":{"data_offsets":[0,99999999999]}}',
        b'{"a":[]}',
        b"[" * 5000,
    ],
    ids=["empty", "float", "negative", "beyond", "no entry", "deep"],
)
def test_a_header_of_tensors_names_places_inside_the_record(header: bytes) -> None:
    for length in (len(header), 1 << 62):
        content = struct.pack("<Q", length) + header
        with bounded(len(content)):
            try:
                assert tensor_ranges(content) == {}
            except ValueError as error:
                assert "\n" not in str(error)


def test_a_name_of_a_megabyte_costs_a_megabyte(tmp_path: Path) -> None:
    path = tmp_path / "mask_dict.json"
    path.write_text(json.dumps({**{str(i): [i] for i in range(18_000)}, "x" * 1_000_000: [7]}))
    with bounded(path.stat().st_size):
        places = Places(path, ((found, i) for i, found in enumerate(members(path))))
    assert places.read("x" * 1_000_000) == [7] and places.read("17") == [17] and places.number("18000") is None


@pytest.mark.parametrize("levels", [900, 10_000, 1_000_000])
def test_json_that_is_nested_too_deep_is_no_json(tmp_path: Path, levels: int) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a":' * levels + "1" + "}" * levels)
    with bounded(path.stat().st_size):
        try:
            parse_json(path.read_bytes())
        except ValueError as error:
            assert "nested too deep" in str(error)
        read_object(path)
        path.write_text("[" * levels + "]" * levels)
        try:
            read_yaml(path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)


def load_keys(path: Path) -> Any:
    return load_job(path, TrainJob, [])


@pytest.mark.parametrize("read", [read_yaml, load_keys])
def test_yaml_that_is_nested_too_deep_is_refused_before_it_is_parsed(
    tmp_path: Path, read: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyYAML takes the square of the open brackets: 4 s for 1,000."""
    path = tmp_path / "a.yaml"
    monkeypatch.setattr(yaml.scanner.Scanner, "fetch_more_tokens", lambda _: pytest.fail("it is parsed"))
    path.write_text("train:\n  eps: " + "[{a: " * 51)
    with pytest.raises((ValueError, ConfigError), match="nested too deep: 101 brackets are open at once"):
        read(path)


def test_yaml_with_many_brackets_side_by_side_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: [" + "[{b: [1]}], " * 500 + "]")
    assert len(read_yaml(path)["a"]) == 500


@pytest.mark.parametrize(
    "facts", ['{"job_id": "17", "array": 1000000000}', '{"job_id": "--user=x", "array": 1}', "[", "[[]]"]
)
def test_status_shows_a_damaged_run_in_its_line_and_goes_on(tmp_path: Path, facts: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    submission = Submission.create(tmp_path / "a", kind="train", resolved={"launch": {}})
    (submission.folder / "slurm.json").write_text(facts)
    with bounded(100):
        damaged, other = look_at_all([tmp_path / "a", tmp_path / "b"])
    assert damaged.state == "unknown" and "slurm.json is damaged" in damaged.why and "\n" not in damaged.why
    assert other.state == "idle"
