"""Prediction: the files for each prompt, the refusals, and the files that a rerun replaces."""

import json
import os
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from disturbed import FINISHED, contents, end_of, in_child
from golden_export import write_golden_export
from PIL import Image
from zoo import FILMS, TICKS, number_of, times, write

from flowmask.models.errors import ConfigError, DataError, UserError
from flowmask.trainer.predict.input_video import InputVideo
from flowmask.trainer.predict.predict import Predictions, predict
from flowmask.trainer.predict.predictions import unique_slugs
from flowmask.trainer.predict.show import overlay
from flowmask.trainer.predict.show.overlay import OverlayVideo, read_mask

PROMPTS = ["the dog running to the left", "two Birds, near: the water!"]
SLUGS = ["the-dog-running-to-the-left", "two-birds-near-the-water"]
FRAMES = 7


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_golden_export(tmp_path_factory.mktemp("golden"))


def _frames(count: int = FRAMES, height: int = 46, width: int = 70) -> list[np.ndarray]:
    y, x = np.mgrid[:height, :width]
    shapes = [(y - 20) ** 2 + (x - 10 - 5 * i) ** 2 < 80 for i in range(count)]
    return [np.stack([200 * shape, 3 * x, 5 * y], -1).astype(np.uint8) for shape in shapes]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25, 2))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 70, 46, "yuv420p"
        for frame in _frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _predict(export: Path, video: Path, out: Path, prompts: list[str] = PROMPTS, **changes: Any) -> Predictions:
    settings = {"precision": "fp32", "device": "cpu"} | changes
    return predict(video, prompts, checkpoint=str(export), out=out, **settings)


def test_every_prompt_gets_its_masks_and_its_video_and_all_get_one_together(
    export: Path, video: Path, tmp_path: Path
) -> None:
    result = _predict(export, video, tmp_path / "p")
    names = {entry.name for entry in (tmp_path / "p").iterdir() if not entry.name.startswith(".")}
    beside = {f"{slug}{end}" for slug in SLUGS for end in (".mp4", ".rle.json")}
    assert names == {*SLUGS, *beside, "overlay.mp4", "predictions.json"}
    assert result.overlay == tmp_path / "p" / "overlay.mp4"
    for prompt, slug in zip(result.prompts, SLUGS):
        assert (prompt.masks, prompt.overlay) == (tmp_path / "p" / slug, tmp_path / "p" / f"{slug}.mp4")
        masks = [read_mask(prompt.masks / f"{i:05d}.png") for i in range(FRAMES)]
        assert len(list(prompt.masks.iterdir())) == FRAMES
        assert all(mask.shape == (46, 70) for mask in masks)
        assert prompt.area_px == [int(mask.sum()) for mask in masks]


def test_overlay_videos_keep_the_frames_and_the_rate_of_the_source(
    export: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlay, "SHORT_SIDE_PX", 480)
    result = _predict(export, video, tmp_path / "p")
    for path in [result.overlay, *(prompt.overlay for prompt in result.prompts)]:
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == Fraction(25, 2)
            decoded = list(container.decode(video=0))
        assert len(decoded) == FRAMES
        assert min(decoded[0].width, decoded[0].height) >= 480


def test_predictions_json_says_what_lies_where(export: Path, video: Path, tmp_path: Path) -> None:
    _predict(export, video, tmp_path / "p")
    said = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert (said["height"], said["width"], said["fps"]) == (46, 70, 12.5)
    assert said["frames"] == [f"{i:05d}" for i in range(FRAMES)]
    assert (said["video"], said["checkpoint"]) == (str(video), str(export))
    assert [entry["prompt"] for entry in said["prompts"]] == PROMPTS
    for entry in said["prompts"]:
        assert (tmp_path / "p" / entry["masks"]).is_dir() and (tmp_path / "p" / entry["overlay"]).is_file()
        assert len(entry["area_px"]) == FRAMES


def test_frames_of_a_folder_come_in_natural_order_and_keep_their_names(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for name, frame in zip(["1", "2", "10"], _frames(3)):
        Image.fromarray(frame).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not a frame")
    source = InputVideo(folder)
    assert source.frame_names == ["1", "2", "10"]
    assert (source.frames([2])[0] == _frames(3)[2]).all()
    result = _predict(export, folder, tmp_path / "p", PROMPTS[:1])
    assert sorted(p.name for p in result.prompts[0].masks.iterdir()) == ["1.png", "10.png", "2.png"]


def test_a_name_that_is_not_utf_8_is_one_line_before_anything_is_read(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    with pytest.raises(DataError, match="not UTF-8"):
        InputVideo(folder)
    Image.fromarray(_frames(1)[0]).save(tmp_path / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(DataError, match="not UTF-8"):
        InputVideo(tmp_path)


def test_photographs_are_read_as_people_see_them(tmp_path: Path) -> None:
    """The camera was turned: the stored picture lies on its side, and EXIF records it."""
    frame, exif = _frames(1)[0][:24], Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(frame)).save(tmp_path / "1.png", exif=exif)
    source = InputVideo(tmp_path)
    assert source.size == frame.shape[:2] and (source.frames([0])[0] == frame).all()


def _entries(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The entries of predictions.json, by video and prompt."""
    found = json.loads((out / "predictions.json").read_text())["prompts"]
    return {(Path(entry["video"]).name, entry["prompt"]): entry for entry in found}


def test_a_second_prediction_replaces_what_is_of_its_video_and_prompt_and_nothing_else(
    export: Path, video: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    _predict(export, video, out)
    (out / "notes.txt").write_text("mine")
    (out / "a-cat.mp4").write_text("mine")
    kept = {path: path.read_bytes() for path in [*(out / SLUGS[0]).iterdir(), out / f"{SLUGS[0]}.mp4"]}
    result = _predict(export, video, out, [PROMPTS[1], "a cat"], max_frames=2)
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert (out / "notes.txt").read_text() == (out / "a-cat.mp4").read_text() == "mine"
    assert [prompt.masks.name for prompt in result.prompts] == [SLUGS[1], "a-cat-2"]
    assert [len(list((out / slug).iterdir())) for slug in (*SLUGS, "a-cat-2")] == [FRAMES, 2, 2]
    entries = _entries(out)
    assert [prompt for _, prompt in entries] == [PROMPTS[0], PROMPTS[1], "a cat"]
    assert [len(entry["frames"]) for entry in entries.values()] == [FRAMES, 2, 2]
    assert all((out / entry["overlay"]).is_file() for entry in entries.values())


def test_another_video_has_names_of_its_own_in_the_same_folder(export: Path, video: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "p", tmp_path / "w.mp4"
    shutil.copy(video, other)
    _predict(export, video, out, PROMPTS[:1])
    before = contents(out)
    result = _predict(export, other, out, PROMPTS[:1])
    assert result.overlay.name == "overlay-2.mp4" and result.prompts[0].masks.name == f"{SLUGS[0]}-2"
    changed = {name for name, content in before.items() if contents(out)[name] != content}
    assert changed == {"predictions.json", ".flowmask.files"}
    assert set(_entries(out)) == {("v.mp4", PROMPTS[0]), ("w.mp4", PROMPTS[0])}


def _decoded(path: Path) -> np.ndarray:
    """float64 [F H W 3]: x264 can write other bits for equal pictures with hard edges."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)])


def test_the_overlay_of_all_prompts_shows_those_that_were_there(export: Path, video: Path, tmp_path: Path) -> None:
    one, both = tmp_path / "one", tmp_path / "both"
    _predict(export, video, both)
    for prompt in PROMPTS:
        _predict(export, video, one, [prompt])
    wanted, found = _decoded(both / "overlay.mp4"), _decoded(one / "overlay.mp4")
    alone = _decoded(one / f"{SLUGS[1]}.mp4")
    assert abs(found - wanted).mean() < 3
    assert abs(found - wanted).mean() < abs(alone - wanted[:, : alone.shape[1]]).mean() / 3


def test_predictions_of_an_earlier_version_stay_and_what_is_no_prediction_is_refused(
    export: Path, video: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    _predict(export, video, out)
    for name in (".flowmask.json", ".flowmask.files", ".lock", *(f"{slug}.rle.json" for slug in SLUGS)):
        (out / name).unlink()
    said = json.loads((out / "predictions.json").read_text())
    said["prompts"] = [{key: e[key] for key in ("prompt", "masks", "overlay", "area_px")} for e in said["prompts"]]
    (out / "predictions.json").write_text(json.dumps(said))
    _predict(export, video, out, ["a cat", PROMPTS[0]])
    assert set(_entries(out)) == {("v.mp4", prompt) for prompt in (*PROMPTS, "a cat")}
    (tmp_path / "here" / "dog").mkdir(parents=True)
    (tmp_path / "here" / "dog" / "rex.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a folder of predictions but holds dog"):
        _predict(export, video, tmp_path / "here", ["dog"])
    assert contents(tmp_path / "here") == {"dog/rex.txt": b"mine"}


def test_two_predictions_at_once_both_stand(export: Path, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    children = [in_child(lambda p=prompt: _predict(export, video, out, [p])) for prompt in ("a dog", "A dog!")]
    assert [end_of(child) for child in children] == [FINISHED, FINISHED]
    entries = _entries(out)
    assert {prompt for _, prompt in entries} == {"a dog", "A dog!"}
    assert {entry["masks"] for entry in entries.values()} == {"a-dog", "a-dog-2"}
    assert all(len(list((out / entry["masks"]).iterdir())) == FRAMES for entry in entries.values())


def test_a_prediction_that_fails_leaves_the_earlier_one_as_it_was(export: Path, video: Path, tmp_path: Path) -> None:
    def stop(_what: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "p"
    _predict(export, video, out)
    before = contents(out)
    with pytest.raises(KeyboardInterrupt):
        _predict(export, video, out, ["a cat"], on_progress=stop)
    assert contents(out) == before


def test_slugs_are_readable_unique_and_never_those_of_the_combined_overlay() -> None:
    slugs = unique_slugs(
        ["The Red Car", "the red car!", "Ünïcode", "猫", "overlay", "a/../b", "x" * 200, "the red car 2"]
    )
    assert slugs[:6] == ["the-red-car", "the-red-car-2", "unicode", "prompt", "overlay-2", "a-b"]
    assert len(set(slugs)) == len(slugs) and "overlay" not in slugs
    assert max(map(len, slugs)) <= 64


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        (["", "x"], "empty"),
        (["  \t"], "empty"),
        (['""'], "empty"),
        (["x", "&nbsp;\u200b"], "empty"),
        ([os.fsdecode(b"caf\xe9")], "not UTF-8"),
    ],
)
def test_a_missing_or_empty_prompt_is_refused_before_anything_is_written(
    export: Path, video: Path, tmp_path: Path, prompts: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _predict(export, video, tmp_path / "p", prompts)
    assert not (tmp_path / "p").exists()


def _broken_inputs(video: Path, folder: Path) -> dict[str, Path]:
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").write_bytes(b"")
    content = video.read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "folder").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "0.jpg").write_text("no image")
    return {name: folder / name for name in ("missing.mp4", "text.mp4", "empty.mp4", "cut.mp4", "folder", "bad")}


@pytest.mark.parametrize("name", ["missing.mp4", "text.mp4", "empty.mp4", "cut.mp4", "folder", "bad"])
def test_an_input_that_is_no_video_is_one_line_that_names_it(
    export: Path, video: Path, tmp_path: Path, name: str
) -> None:
    path = _broken_inputs(video, tmp_path)[name]
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        _predict(export, path, tmp_path / "p")
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_one_line(export: Path, video: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*can't be written"):
        _predict(export, video, tmp_path / "file" / "p")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(export: Path, video: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="can't be written"):
        _predict(export, video, tmp_path / "p")


@pytest.mark.parametrize("name", ["h264_cut.mp4", "h264_variable.mkv", "h264_variable.avi", "h264_turned90.mp4"])
def test_a_mask_is_named_by_the_frame_a_player_shows_and_the_overlay_lasts_as_long(name: str, tmp_path: Path) -> None:
    film = next(film for film in FILMS if film.name == name)
    shown = write(tmp_path / name, film)
    begins = [tick / TICKS / float(film.rate) for tick in times(film)]
    source = InputVideo(tmp_path / name)
    assert source.frame_names == [f"{i:05d}" for i in range(len(shown))]
    for place in (0, len(shown) // 2, len(shown) - 1):
        assert number_of(np.rot90(source.frames([place])[0], film.turn // 90)) == shown[place]
    height, width = source.size
    with OverlayVideo(tmp_path / "o.mp4", prompts=[], height=height, width=width, fps=source.fps) as overlay:
        for i in range(len(shown)):
            overlay.add(source.frames([i])[0], [])
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert container.duration is not None and container.streams.video[0].frames == len(shown)
        assert abs(container.duration / av.time_base - (begins[shown[-1] + 1] - begins[shown[0]])) < 0.17


def test_what_is_left_of_a_video_that_lost_its_end_is_taken_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "h264.mkv"
    write(path, next(film for film in FILMS if film.name == path.name))
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(UserError, match=r"of 60 frames can be read .*--allow-truncated"):
        InputVideo(path)
    source = InputVideo(path, allow_truncated=True)
    assert 20 < len(source.frame_names) < 60
    assert number_of(source.frames([20])[0]) == 20
