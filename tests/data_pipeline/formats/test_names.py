"""Any ids give file names that are safe and distinct on every system. Safe ids stay; frames are ordered by number."""

import random
import string
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmask.data_pipeline.formats.names import file_names, in_time_order, same_file

SAFE = ["0", "12", "bmx-trees", "0a1b2c3d4e", "coco_000000581857", "My Film (1)", "видео", "café", "v1.2", "x" * 200]
HOSTILE = ["a/b", "a\\b", "..", ".", "...", "a.", "a ", " a", ".hidden", "CON", "nul.txt", "com1", "LPT9.x", "a:b",
           "a*?", "x" * 201, "é" * 101, "a%2fb", "a%2Fb", "%~", "100%", "A", "a", "straße", "STRASSE", "cafe\u0301",
           "café", "ﬁ", "fi", "/", "a//b", "a/", "-rf", "~", "$(x)", "a'b", "名前/１", "\u2126", "Ω"]  # fmt: skip
ids = st.sets(
    st.one_of(
        st.sampled_from(HOSTILE + SAFE),
        st.text(st.sampled_from('aAbB./%~2f:é \u0301"'), min_size=1, max_size=6),
        st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=300),
    ),
    min_size=1,
    max_size=30,
)


def test_names_that_every_file_system_keeps_stay_as_they_are():
    assert file_names(SAFE) == {name: name for name in SAFE}


def distinct_and_safe(found: dict[str, str]) -> None:
    assert len({same_file(name) for name in found.values()}) == len(found)
    for given_id, name in found.items():
        assert 0 < len(name.encode()) <= 200 and name[0] not in ". " and name[-1] not in ". "
        assert not set(name) & {*'/\\:*?"<>|', *map(chr, range(32))}
        stem = name.lower().partition(".")[0].rstrip()
        assert stem not in {"con", "prn", "aux", "nul"} and not (stem[:3] in ("com", "lpt") and stem[3:].isdigit())
        assert unquote(name) == given_id or "%~" in name


@settings(max_examples=200)
@given(ids)
def test_any_ids_give_safe_names_no_two_of_which_are_one_and_lead_back(names: set[str]):
    distinct_and_safe(file_names(names))


@settings(max_examples=60)
@given(st.sets(st.tuples(*[st.text(st.sampled_from("aA_./%"), min_size=1, max_size=4)] * 2), min_size=1, max_size=30))
def test_two_ids_joined_by_a_sign_that_stands_in_ids_are_told_apart(pairs: set[tuple[str, str]]):
    keys = set()
    for video, expression in pairs:  # each pair separately, as names of a video and of its expression
        keys.add(f"{file_names([video])[video]}/{file_names([expression])[expression]}")
    joined = file_names(keys, spelled=lambda key: key.replace("/", "_"))
    assert len({same_file(name) for name in joined.values()}) == len(keys)


def test_only_what_two_pairs_share_is_spelled_out():
    keys = ["a_b/c", "a/b_c", "d/e"]
    assert file_names(keys, spelled=lambda key: key.replace("/", "_")) == {
        "a_b/c": "a_b%2fc",
        "a/b_c": "a%2fb_c",
        "d/e": "d_e",
    }


def test_a_file_is_made_for_each_of_the_hostile_ids(tmp_path: Path):
    names = file_names(HOSTILE)
    for given_id, name in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / f".tmp-{name}.json.0123abcd").write_text(given_id)
    assert len(list(tmp_path.iterdir())) == 2 * len(HOSTILE)


@pytest.mark.parametrize("pad", [0, 2, 5])
@pytest.mark.parametrize("form", ["{}", "frame{}", "f_{}_left", "{}.5"])
def test_numbers_in_names_count_as_numbers(pad: int, form: str):
    numbers = sorted({0, 1, 2, 9, 10, 11, 99, 100, 12345, *random.Random(0).sample(range(10**6), 20)})
    names = [form.format(str(number).zfill(pad)) for number in numbers]
    assert in_time_order(random.Random(1).sample(names, len(names))) == names


def test_any_names_have_one_order():
    draw = random.Random(2)
    names = ["".join(draw.choices(string.printable[:40] + "²٣", k=draw.randint(1, 6))) for _ in range(200)]
    names += ["9" * 5000, "1", "01", "001"]
    ordered = in_time_order(names)
    assert in_time_order(ordered[::-1]) == ordered and ordered.index("1") > ordered.index("01")
