"""Text for a terminal: text of strangers can't move the cursor, change colours or pretend to be another line."""

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_HARMFUL = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of a character, line and paragraph separators
_JOINERS = "\u200c\u200d"  # of the format characters (Cf) those that scripts and emoji need; others turn text around


def printable(text: object, *, keep: str = "") -> str:
    """`text` on one line, with each harmful character as its Python escape (`\\x1b`, `\\n`); `keep`: but for these."""
    said = str(text)
    if said.isprintable():
        return said
    return "".join(c if c in keep or not _is_harmful(c) else c.encode("unicode_escape").decode() for c in said)


def has_control(text: str) -> bool:
    """Whether a text holds a character that can end a line or steer a terminal."""
    return not text.isprintable() and any(unicodedata.category(c) in _HARMFUL for c in text)


def _is_harmful(character: str) -> bool:
    category = unicodedata.category(character)
    return category in _HARMFUL or (category == "Cf" and character not in _JOINERS)


class PlainConsole(Console):
    """Prints every text as it is, never as markup, and harmful characters as escapes; styles are ours alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(soft_wrap=True, highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n"))
