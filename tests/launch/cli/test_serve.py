"""`flowmask serve` before the page is there: a line at once, and one line for a mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
from command import environment, flowmask

FIRST_WORD = """
import sys
from flowmask.launch.console import err
from flowmask.launch.cli import main
def say(line, **_):
    print(line, [name for name in ("torch", "gradio", "diffusers") if name in sys.modules])
    raise SystemExit(0)
err.print = say
sys.argv = ["flowmask", "serve", "RUN"]
main.main()
"""


def test_the_first_word_comes_before_anything_heavy_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_WORD], capture_output=True, text=True, env=environment())
    assert done.stdout == "flowmask serve: loading RUN []\n", done.stderr


def test_without_gradio_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowmask.launch.serve.page import require
    from flowmask.models.errors import ConfigError

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"needs Gradio: pip install 'flowmask\[serve\]'"):
        require()


@pytest.mark.parametrize(("option", "value"), [("--port", "70000"), ("--max-sentences", "0"), ("--max-waiting", "31")])
def test_a_limit_out_of_its_range_is_refused(option: str, value: str) -> None:
    done = flowmask("serve", "RUN", option, value)
    assert done.returncode == 2 and option in done.stderr and "Traceback" not in done.stderr
