"""Each limit of the page gives one line with the value, the limit and the fix."""

from pathlib import Path

import pytest
from film import write_film

from flowmask.launch.serve.limits import FORM_BYTES, MIB, LimitError, Limits, shown_frames
from flowmask.models.errors import DataError

LIMITS = Limits(megabytes=2, seconds=1.5, sentences=3, waiting=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no sentence"),
        (" \n\t\n", "there is no sentence"),
        ("a\nb\nc\nd", "there are 4 sentences; at most 3 are accepted"),
        ("a\n" + "x" * 301, 'the sentence "xxxx.* has 301 characters; at most 300 are accepted'),
    ],
)
def test_sentences_that_are_not_taken_are_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(LimitError, match=said):
        LIMITS.sentences_in(text)


def test_every_line_with_words_is_a_sentence_and_each_counts_once() -> None:
    assert LIMITS.sentences_in("  the dog \r\n\n the dog\nthe cat\x0bthe dog\n") == ["the dog", "the cat"]
    assert LIMITS.sentences_in("x" * 300) == ["x" * 300]


def test_a_body_is_taken_by_its_size_and_must_say_it() -> None:
    LIMITS.refuse_body(2 * MIB + FORM_BYTES, upload=True)
    LIMITS.refuse_body(FORM_BYTES, upload=False)
    for length, upload, said in (
        (None, True, "must state its size"),
        (3 * MIB, True, r"has 3\.0 MB; at most 2 MB are accepted"),
        (FORM_BYTES + 1, False, "at most 262144 are accepted"),
    ):
        with pytest.raises(LimitError, match=said):
            LIMITS.refuse_body(length, upload=upload)


@pytest.mark.parametrize(("frames", "said"), [(15, None), (16, r"is 1\.6 s long; at most 1\.5 s are accepted")])
def test_a_clip_is_taken_up_to_its_most_seconds(tmp_path: Path, frames: int, said: str | None) -> None:
    write_film(tmp_path / "film.mp4", frames=frames)
    if said is None:
        assert LIMITS.clip(tmp_path / "film.mp4") == f"64x48 px, {frames} frames, {frames / 10:.1f} s"
        return
    with pytest.raises(LimitError, match=said):
        LIMITS.clip(tmp_path / "film.mp4")


class Claims:
    """A video whose name sets its size, frames and rate."""

    def __init__(self, path: Path) -> None:
        width, height, frames, self.fps = map(float, path.name.split("-"))
        self.size, self.frame_names = (int(height), int(width)), [""] * int(frames)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ("4096-2304-90-60", None),
        ("4097-2304-90-60", "frames of the clip are 4097x2304 px; at most 9.4 megapixels"),
        ("64-48-91-1000", "the clip has 91 frames; at most 90 are accepted"),
    ],
)
def test_neither_large_frames_nor_a_false_rate_get_around_the_limits(
    claim: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmask.launch.serve.limits.InputVideo", Claims)
    if said is None:
        LIMITS.clip(Path(claim))
        return
    with pytest.raises(LimitError, match=said):
        LIMITS.clip(Path(claim))


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("no video")
    with pytest.raises(DataError, match="no readable video"):
        LIMITS.clip(tmp_path / "notes.mp4")


@pytest.mark.parametrize("count", range(1, 20))
def test_the_frames_that_are_shown_are_in_order_with_the_first_and_the_last(count: int) -> None:
    frames = [f"{i:05d}" for i in range(count)]
    shown = shown_frames(frames, 6)
    assert shown == sorted(set(shown)) and len(shown) == min(count, 6)
    assert (shown[0], shown[-1]) == (frames[0], frames[-1])
