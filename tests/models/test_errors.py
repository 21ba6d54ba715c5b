"""The law of every message to a user: one line of readable length."""

import errno
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flowmask.models.errors import CacheError, help_of_disk


@given(st.text())
@example("first\nsecond\r\n  third")
@example("[" * 100_000)
def test_a_message_is_one_line_of_bounded_length_whatever_a_library_said(text: str) -> None:
    said = str(CacheError(text))
    assert len(said.splitlines()) <= 1 and len(said) < 1600


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EFBIG, "raise the limit of file sizes (`ulimit -f`)"),
        (errno.EACCES, "check its permissions"),
        (errno.EROFS, "check its permissions"),
    ],
)
def test_what_helps_follows_from_the_number_or_from_the_systems_words(number: int, fix: str) -> None:
    words = os.strerror(number)
    assert help_of_disk(OSError(number, words)) == fix == help_of_disk(RuntimeError(f"I/O error: {words} (os error)"))
