"""Text from any file is shown, and has no other effect on a terminal."""

import io
import unicodedata

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flowmask.models.safe.words import PlainConsole, has_control, printable

HARMLESS = "plain é 日本語\u3000Ω نمی\u200cدانم 👩\u200d🚀"


@given(st.text() | st.text(alphabet="\x1b[]\\;0?\n\r\t\x07\x9b\u202e\u2028a").filter(bool))
def test_what_is_printable_is_one_line_without_control_characters_and_stays_so(text: str) -> None:
    said = printable(text)
    assert not has_control(said) and said.splitlines() in ([said], [])
    assert not {"\u202a", "\u202e", "\u2066", "\ufeff"} & set(said)
    assert printable(said) == said
    assert printable(HARMLESS) == HARMLESS


@given(st.text(alphabet="ab\x1b[]\\;m0\r\x07\x9b\u202e"))
def test_a_console_prints_no_harmful_character_whatever_it_is_given(text: str) -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=False, width=200)
    table = Table(text, title=text)
    table.add_row(text, Text(text))
    console.print(text, Text(text), Group(Text.assemble((text, "bold")), table), style="red")
    assert {unicodedata.category(c) for c in file.getvalue() if c != "\n"}.isdisjoint({"Cc", "Cf"})


def test_markup_and_names_of_emoji_are_text() -> None:
    file = io.StringIO()
    PlainConsole(file=file).print("[red]dog[/red] [/] :dog: [link=http://x]y[/link]")
    assert file.getvalue() == "[red]dog[/red] [/] :dog: [link=http://x]y[/link]\n"
