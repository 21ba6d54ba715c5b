"""The law of every message to a user: one line of readable length."""

from hypothesis import example, given
from hypothesis import strategies as st

from flowmask.models.errors import CacheError


@given(st.text())
@example("first\nsecond\r\n  third")
@example("[" * 100_000)
def test_a_message_is_one_line_of_bounded_length_whatever_a_library_said(text: str) -> None:
    said = str(CacheError(text))
    assert len(said.splitlines()) <= 1 and len(said) < 1600
