"""Prediction of several videos at once, at another rate, with another threshold; files of all kinds."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from disturbed import contents
from golden_export import write_golden_export
from PIL import Image
from pycocotools import mask as coco
from zoo import FILMS, Film, number_of, write

from flowmask.models.errors import ConfigError, UserError
from flowmask.trainer.predict.inference import LoadedSegmenter, load_segmenter
from flowmask.trainer.predict.input_video import InputVideo
from flowmask.trainer.predict.predict import Predictions, predict, predict_videos
from flowmask.trainer.predict.predictions import result_folders
from flowmask.trainer.predict.show.overlay import read_mask

X264 = {"preset": "ultrafast"}
SETTINGS: dict[str, Any] = {"precision": "fp32", "device": "cpu"}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(write_golden_export(tmp_path_factory.mktemp("golden")))


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write(path, Film("film.mp4", "libx264", frames=5, options=X264))
    return path


def _grows(path: Path) -> Path:
    """A film that passes the first check, and whose picture size changes in the middle."""
    parts = []
    for size in ((64, 100), (96, 100)):
        write(path, Film("part.h264", "libx264", frames=3, size=size, options=X264))
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    return path


def _masks(result: Predictions) -> list[np.ndarray]:
    return [read_mask(one.masks / f"{name}.png") for one in result.prompts for name in result.frame_names]


def test_several_videos_are_done_as_each_alone_with_weights_loaded_once(
    export: str, film: Path, tmp_path: Path
) -> None:
    other = tmp_path / "film.mov"
    write(other, Film("film.mov", "libx264", frames=2, options=X264))
    loaded: list[str] = []

    def load(*of: Any, **how: Any) -> LoadedSegmenter:
        loaded.append("once")
        return load_segmenter(*of, **how)

    folders = result_folders(tmp_path / "out", [film, other])
    results = predict_videos(folders, ["a dog"], checkpoint=export, load=load, **SETTINGS)
    assert loaded == ["once"]
    assert [result.overlay for result in results] == [tmp_path / f"out/{n}/overlay.mp4" for n in ("film", "film-2")]
    for video, result, number in zip([film, other], results, range(2)):
        alone = predict(video, ["a dog"], checkpoint=export, out=tmp_path / f"alone{number}", **SETTINGS)
        assert contents(result.prompts[0].masks) == contents(alone.prompts[0].masks)


def test_a_video_that_fails_leaves_the_others_done_and_is_named_at_the_end(
    export: str, film: Path, tmp_path: Path
) -> None:
    grows, folders = _grows(tmp_path / "grows.h264"), {}
    for name, video in (("a", film), ("b", grows), ("c", film)):
        folders[tmp_path / name] = video
    lines: list[str] = []
    with pytest.raises(UserError, match=r"1 of 3 videos failed.*grows\.h264.*frame 3 has 96x100") as caught:
        predict_videos(folders, ["a dog"], checkpoint=export, say=lines.append, **SETTINGS)
    assert "\n" not in str(caught.value) and any("grows.h264" in line for line in lines)
    assert [(tmp_path / name / "predictions.json").is_file() for name in "abc"] == [True, False, True]


def test_what_is_wrong_with_any_video_is_said_before_weights_are_loaded(film: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    videos = {tmp_path / "a": film, tmp_path / "b": tmp_path / "text.mp4"}
    with pytest.raises(UserError, match=r"text\.mp4"):
        predict_videos(videos, ["a dog"], checkpoint="no weights")


def test_each_of_several_videos_has_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "d" / "clip.v2").mkdir(parents=True)
    videos = [tmp_path / name for name in ("a/v.mp4", "b/v.mp4", "V.mov", "v-2.mp4", "d/clip.v2", "w.gif")]
    names = [folder.name for folder in result_folders(tmp_path / "out", videos)]
    assert names == ["v", "v-2", "V-3", "v-2-2", "clip.v2", "w"]
    assert result_folders(tmp_path / "out", videos[:1]) == {tmp_path / "out": videos[0]}
    with pytest.raises(ConfigError, match=r"v\.mp4 is given twice"):
        result_folders(tmp_path, [tmp_path / "v.mp4", tmp_path / "a" / ".." / "v.mp4"])


@pytest.mark.parametrize("name", ["h264_variable.mp4", "ntsc.mkv", "picture.gif", "vp9.webm", "h264_cut.mov"])
def test_a_lower_rate_takes_the_pictures_on_the_screen_and_names_them(name: str, tmp_path: Path) -> None:
    film = next(film for film in FILMS if film.name == name)
    shown = write(tmp_path / name, film)
    source = InputVideo(tmp_path / name, fps=7)
    assert source.source_frames is not None and source.fps == 7
    assert source.frame_names == [f"{place:05d}" for place in range(len(source.source_frames))]
    ids = range(len(source.frame_names))
    assert [number_of(frame) for frame in source.frames(ids)] == [shown[i] for i in source.source_frames]
    pieces = [source.frames([i])[0] for i in ids]  # one by one, as windows read them
    assert [number_of(frame) for frame in pieces] == [shown[i] for i in source.source_frames]


def test_a_rate_that_the_video_has_or_does_not_reach_takes_each_picture_once(film: Path) -> None:
    everything = InputVideo(film)
    for fps in (25.0, 60.0, 1000.0):
        source = InputVideo(film, fps=fps)
        assert (source.frame_names, source.fps, source.source_frames) == (everything.frame_names, 25.0, None)
        assert [note for note in source.notes if "25 frames per second: all are used" in note] == source.notes
        assert bool(source.notes) == (fps > 25)


@pytest.mark.parametrize("fps", [0.0, -1.0, 1e9, float("nan")])
def test_a_rate_that_is_none_is_one_line(film: Path, fps: float) -> None:
    with pytest.raises(ConfigError, match=r"fps is .*0\.01 to 1000"):
        InputVideo(film, fps=fps)


def test_masks_overlay_and_predictions_json_follow_the_rate(export: str, tmp_path: Path) -> None:
    path, out = tmp_path / "film.mp4", tmp_path / "out"
    write(path, Film("film.mp4", "libx264", frames=11, options=X264))
    whole = predict(path, ["a dog"], checkpoint=export, out=out, **SETTINGS)
    slow = predict(path, ["a cat"], checkpoint=export, out=out, fps=10, max_frames=4, **SETTINGS)
    assert (len(whole.frame_names), slow.frame_names, slow.fps) == (11, ["00000", "00001", "00002", "00003"], 10)
    first, second = json.loads((out / "predictions.json").read_text())["prompts"]
    assert first["source_frames"] is None
    assert (second["source_frames"], second["frames"], second["fps"]) == ([0, 2, 5, 7], slow.frame_names, 10)
    assert [entry["frame"] for entry in json.loads((out / "a-cat.rle.json").read_text())] == slow.frame_names
    with av.open(str(slow.overlay)) as container:
        assert container.streams.video[0].average_rate == Fraction(10)
        assert len(list(container.decode(video=0))) == 4
    assert _with_legend_of(1) == _high(slow.overlay), "earlier masks are of other pictures: not shown together"
    again = predict(path, ["a bird"], checkpoint=export, out=out, fps=10, max_frames=4, **SETTINGS)
    assert _with_legend_of(2) == _high(again.overlay)


def _high(path: Path) -> int:
    with av.open(str(path)) as container:
        return container.streams.video[0].height


def _with_legend_of(count: int) -> int:
    """The height of an overlay of a film of 64x100 px with `count` short sentences."""
    from flowmask.trainer.predict.show.overlay import colour, legend, view_size

    high, wide = view_size(64, 100)
    high += legend([("a", colour(number)) for number in range(count)], width=wide).shape[0]
    return high + high % 2


@pytest.mark.parametrize("kind", ["mp4", "mov", "webm", "gif", "frames"])
def test_every_kind_of_input_gives_masks_that_its_run_lengths_repeat(kind: str, export: str, tmp_path: Path) -> None:
    codec, form = {"webm": ("libvpx", "yuv420p"), "gif": ("gif", "rgb8")}.get(kind, ("libx264", "yuv420p"))
    path = tmp_path / f"film.{kind}"
    if kind == "frames":
        path.mkdir()
        for number in range(3):
            Image.fromarray(np.full((64, 100, 3), 50 * number, np.uint8)).save(path / f"{number}.jpg")
    else:
        write(path, Film(path.name, codec, frames=3, pix_fmt=form, options={} if codec != "libx264" else X264))
    result = predict(path, ["a dog"], checkpoint=export, out=tmp_path / "out", **SETTINGS)
    entries = json.loads((tmp_path / "out" / "a-dog.rle.json").read_text())
    masks = _masks(result)
    assert len(masks) == 3 and [entry["frame"] for entry in entries] == result.frame_names
    assert all((coco.decode(entry) == mask).all() for entry, mask in zip(entries, masks))


def test_a_higher_threshold_keeps_a_part_of_the_masks_and_the_number_of_presence(
    export: str, film: Path, tmp_path: Path
) -> None:
    found = {
        level: predict(film, ["a dog"], checkpoint=export, out=tmp_path / str(level), threshold=level, **SETTINGS)
        for level in (0.1, 0.5, 0.9)
    }
    low, middle, high = map(_masks, found.values())
    assert all((b <= a).all() and (c <= b).all() for a, b, c in zip(low, middle, high))
    assert np.sum(low) > np.sum(middle) > np.sum(high)
    assert len({result.prompts[0].presence for result in found.values()}) == 1
    assert json.loads((tmp_path / "0.9" / "predictions.json").read_text())["mask_threshold"] == 0.9


def test_masks_that_are_all_empty_are_said_to_be(export: str, film: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for level, empty in ((0.5, False), (1 - 1e-7, True)):
        out = tmp_path / str(level)
        result = predict(film, ["a dog"], checkpoint=export, out=out, threshold=level, say=said.append, **SETTINGS)
        assert any(result.prompts[0].area_px) is not empty
    assert [line for line in said if "empty" in line] == [
        "'a dog': all masks are empty, because no pixel of any frame is above the threshold 0.9999999"
    ]


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, 50.0, float("nan")])
def test_a_threshold_that_is_no_probability_is_one_line(film: Path, tmp_path: Path, threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold is .*above 0 and below 1"):
        predict(film, ["a dog"], checkpoint="none", out=tmp_path / "out", threshold=threshold)


def test_what_takes_long_is_announced_before_it_begins(export: str, film: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    predict(film, ["a", "b"], checkpoint=export, out=tmp_path, on_progress=lambda *of: told.append(of), **SETTINGS)
    names = list(dict.fromkeys(what for what, _, _ in told))
    assert names == ["videos", "weights", "windows", "sentences", "frames"]
    for name in names:
        of = [(done, total) for what, done, total in told if what == name]
        assert of[0][0] == 0 and of[-1][0] == of[-1][1], name
    assert ("sentences", 2, 2) in told and ("frames", 5, 5) in told
