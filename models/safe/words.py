"""Text for a terminal: foreign text can't move the cursor, change colours or look like another line."""

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_HARMFUL = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of a character, line and paragraph separators
_JOINERS = "\u200c\u200d"  # format characters (Cf) that scripts and emoji need; others change the text's direction


def printable(text: object, *, keep: str = "") -> str:
    """`text` on one line, with each harmful character as its Python escape (`\\x1b`, `\\n`), except those in `keep`."""
    said = str(text)
    if said.isprintable():
        return said
    return "".join(c if c in keep or not _is_harmful(c) else c.encode("unicode_escape").decode() for c in said)


def has_control(text: str) -> bool:
    """Whether a text has a character that can end a line or control a terminal."""
    return not text.isprintable() and any(unicodedata.category(c) in _HARMFUL for c in text)


def _is_harmful(character: str) -> bool:
    category = unicodedata.category(character)
    return category in _HARMFUL or (category == "Cf" and character not in _JOINERS)


class PlainConsole(Console):
    """Prints every text as it is, never as markup, and harmful characters as escapes; only FlowMask's styles count."""

    def __init__(self, **options: Any) -> None:
        super().__init__(soft_wrap=True, highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n"))
