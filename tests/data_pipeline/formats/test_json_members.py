"""Laws of the member-wise reader: it finds the members and places that json finds, and refuses like json."""

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from trials import TRIALS

from flowmask.data_pipeline.formats import json_members
from flowmask.data_pipeline.formats.json_file import unique_keys
from flowmask.data_pipeline.formats.json_members import Places, members, read_range
from flowmask.models.errors import DataError


def value(draw: random.Random, depth: int = 0) -> Any:
    if depth < 3 and draw.random() < 0.5:
        if draw.random() < 0.5:
            return [value(draw, depth + 1) for _ in range(draw.randint(0, 4))]
        return {f'k{i}é"': value(draw, depth + 1) for i in range(draw.randint(0, 4))}
    return draw.choice([None, True, -17, 2.5e-7, 1e300, "", 'é"\\{', "日本", '}],"'])


def loads(content: bytes, field: str | None) -> dict[str, Any] | None:
    """The object that json gives; None if json refuses, or if it is no object."""
    try:
        found = json.loads(content, object_pairs_hook=unique_keys)
        found = found if field is None else found[field]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


@pytest.mark.parametrize("trial", range(40 * TRIALS))
def test_members_are_those_of_json_for_any_window_and_damage(tmp_path: Path, monkeypatch, trial: int):
    draw = random.Random(f"{os.environ.get('SEED', '0')} {trial}")
    monkeypatch.setattr(json_members, "_CHUNK", draw.choice([1, 3, 50, 4000]))
    path, field = tmp_path / "file.json", draw.choice([None, "videos"])
    inner = {f'n{i}"é日\\': value(draw) for i in range(draw.randint(0, 6))}
    content = {"a": value(draw), "videos": inner, "z": value(draw)} if field else inner
    path.write_text(json.dumps(content, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 2])))
    found = list(members(path, field=field))
    assert {member.name: member.value for member in found} == inner
    places = Places(path, [(member, number) for number, member in enumerate(found)])
    for number, member in enumerate(found):
        assert places.read(member.name) == member.value == read_range(path, member.start, member.length)
        assert places.number(member.name) == number
        assert read_range(path, member.name_start, member.name_length) == member.name
    assert places.number("absent") is None
    damaged = bytearray(path.read_bytes())
    damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    path.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged) + 1)])])
    expected = loads(path.read_bytes(), field)
    try:
        got = {member.name: member.value for member in members(path, field=field)}
    except DataError as error:
        assert expected is None and "\n" not in str(error)
    else:
        assert got == expected


def test_memory_is_that_of_one_member(tmp_path: Path):
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps({str(i): ["x" * 1000] * 20 for i in range(count)}))
        tracemalloc.start()
        assert sum(1 for _ in members(path)) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(1500) < 1.2 * peak(500)
