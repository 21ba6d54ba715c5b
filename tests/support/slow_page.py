"""A page whose predictions never end, as a program: `slow_page.py FOLDER`. It prints each begin and end on stderr."""

import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from flowmask.launch.local.worker import run_process
from flowmask.launch.serve.limits import Limits
from flowmask.launch.serve.server import address_of, listen, serve


def segment(video: Path, prompts: list[str], *, out: Path, on_progress: Any, say: Any) -> NoReturn:
    out.mkdir()
    (out / "part.png").write_text(prompts[0])
    print("begins", prompts[0], file=sys.stderr, flush=True)
    try:
        while True:
            on_progress("windows", 1, 2)
            time.sleep(0.02)
    finally:
        print("ends", prompts[0], file=sys.stderr, flush=True)


def work(parent: Path) -> None:
    parent.mkdir()
    listening = listen("127.0.0.1", 0)
    ready = lambda: print(address_of(listening), flush=True)  # noqa: E731
    serve(listening, lambda: segment, title="slow", clips={}, limits=Limits(), parent=parent, on_ready=ready)  # type: ignore[arg-type]


if __name__ == "__main__":
    run_process(lambda: work(Path(sys.argv[1])))
