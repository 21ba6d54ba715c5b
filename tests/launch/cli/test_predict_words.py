"""The command line of `flowmask predict`: which word is a video, which a sentence, and the resulting call."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowmask.launch.cli.main import app
from flowmask.models.config import SamplerConfig
from flowmask.models.errors import ConfigError, UserError


class Given:
    """The arguments of the prediction, which is then refused."""

    videos: list[Path]
    prompts: list[str]
    options: dict[str, Any]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Given:
    found = Given()

    def stop(videos: dict[Path, Path], prompts: list[str], **options: Any) -> None:
        found.videos, found.prompts, found.options = list(videos.values()), prompts, options
        raise ConfigError("seen")

    monkeypatch.setattr("flowmask.trainer.predict.predict.predict_videos", stop)
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "b.mp4"):
        Path(name).touch()
    Path("run").mkdir()
    return found


def _run(*words: str, stdin: str | bytes | None = None) -> None:
    result = CliRunner().invoke(app, ["predict", *words, "--checkpoint", "run"], input=stdin)
    assert str(result.exception) == "seen", (result.exception, result.output)


def _refusal(*words: str, stdin: str | bytes | None = None) -> str:
    error = CliRunner().invoke(app, ["predict", *words, "--checkpoint", "run"], input=stdin).exception
    assert isinstance(error, UserError) and str(error) != "seen", error
    return str(error)


def test_the_first_word_is_the_video_unless_videos_are_named(given: Given) -> None:
    _run("a.mp4", "a dog", "a cat")
    assert (given.videos, given.prompts) == ([Path("a.mp4")], ["a dog", "a cat"])
    _run("--video", "a.mp4", "a dog", "--video", "b.mp4", "a cat")
    assert (given.videos, given.prompts) == ([Path("a.mp4"), Path("b.mp4")], ["a dog", "a cat"])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_sentences_of_a_file_follow_those_of_the_command_line(given: Given, end: str, mark: str) -> None:
    lines = ["  the dog ", "", "\t", "zwei Bären", "the dog", "a\u2028b"]
    Path("p.txt").write_bytes((mark + end.join(lines)).encode())
    wanted = ["the dog", "zwei Bären", "a\u2028b"]
    _run("a.mp4", "--prompts", "p.txt")
    assert (given.videos, given.prompts) == ([Path("a.mp4")], wanted)
    _run("a.mp4", "a cat", "the dog", "--prompts", "p.txt")
    assert given.prompts == ["a cat", "the dog", *wanted[1:]]
    _run("--video", "a.mp4", "--prompts", "-", stdin=(mark + end.join(lines)).encode())
    assert (given.videos, given.prompts) == ([Path("a.mp4")], wanted)


def test_settings_reach_the_prediction_and_defaults_are_those_of_before(given: Given) -> None:
    _run("a.mp4", "a dog")
    assert given.options["sampler"] == SamplerConfig() and given.options["box"] is None
    defaults = {"threshold": 0.5, "device": "auto", "precision": "bf16", "fps": None, "figures": False}
    assert {key: given.options[key] for key in defaults} == defaults
    changes = "--steps 4 --shift 1.5 --height 240 --width 432 --threshold 0.3 --device cpu --precision fp32 --fps 6"
    _run("a.mp4", "a dog", *changes.split(), "--figures", "--max-frames", "9")
    assert given.options["sampler"] == SamplerConfig(steps=4, shift=1.5)
    assert (given.options["box"].height_px, given.options["box"].width_px) == (240, 432)
    wanted = {"threshold": 0.3, "device": "cpu", "precision": "fp32", "fps": 6.0, "figures": True, "max_frames": 9}
    assert {key: given.options[key] for key in wanted} == wanted


def test_mistakes_are_one_line_that_says_what_is_right(given: Given) -> None:
    Path("empty.txt").write_bytes(b"\xef\xbb\xbf \r\n\r\n")
    Path("old.txt").write_bytes(b"the dog\r\ncaf\xe9\r\n")
    Path("wide.txt").write_text("the dog", encoding="utf-16")
    refusals = {
        (): "no video was given",
        ("none.mp4", "a dog"): "none.mp4: no such video file or folder of frames",
        ("a.mp4", "b.mp4", "a dog"): "b.mp4 is a file, but a sentence is expected here; for several videos use --video",
        ("a.mp4", "--prompts", "no.txt"): "--prompts no.txt can't be read: no such file",
        ("a.mp4", "--prompts", "."): "--prompts . can't be read: is a directory",
        ("a.mp4", "--prompts", "empty.txt"): "--prompts empty.txt holds no sentence",
        ("a.mp4", "--prompts", "old.txt"): "old.txt: line 2 is not UTF-8",
        ("a.mp4", "--prompts", "wide.txt"): "wide.txt: line 1 is not UTF-8",
        ("a.mp4", "a dog", "--height", "64"): "--height and --width must be given together",
        ("a.mp4", "a dog", "--shift", "0"): "--shift is 0; it must be above 0",
        ("a.mp4", "a dog", "--clip-frames", "16"): "--clip-frames was removed; use --window-frames",
        ("--video", "b.mp4", "--video", "./b.mp4", "a dog"): "is given twice",
    }
    for words, said in refusals.items():
        assert said in _refusal(*words), words
