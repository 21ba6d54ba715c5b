"""Frames match their masks in every order and spelling, ids are unique, and the identity covers all inputs of bytes."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from film import SIZE as FILM_SIZE
from film import write_film
from layouts import write_refcoco, write_youtube
from PIL import Image

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.cache.manifest import read_manifest
from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Video
from flowmask.models.errors import CacheError, DataError

SIZE = (16, 24)
FRAMES = 12


def videos_of(source: str, root: Path, split: str = "train") -> list[Video]:
    return list(open_source(DataSourceConfig(source=source, root=root, split=split)).videos())


def scene(frame: int) -> np.ndarray:
    """Bool [H W]: a moving object; its place tells the frame."""
    mask = np.zeros(SIZE, bool)
    mask[4:12, 2 * frame : 2 * frame + 3] = True
    return mask


def save_frame(path: Path, frame: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.where(scene(frame), 250, 5).astype(np.uint8)).save(path, quality=95)


def write_mevis(root: Path, names: list[str], *, suffix: str = ".jpg", listed: Callable[[str], str] = str) -> None:
    """A video whose frame named i shows scene(i); masks follow the places in the list."""
    split = root / "train"
    numbers = [int("".join(filter(str.isdigit, name))) for name in names]
    for name, number in zip(names, numbers, strict=True):
        save_frame(split / "JPEGImages" / "v" / f"{name}{suffix}", number)
    masks = {"0": [rle.encode(scene(number)) for number in numbers]}
    entry = {"frames": list(map(listed, names)), "expressions": {"0": {"exp": "it", "anno_id": [0]}}}
    (split / "meta_expressions.json").write_text(json.dumps({"videos": {"v": entry}}))
    (split / "mask_dict.json").write_text(json.dumps(masks))


def assert_paired(video: Video) -> None:
    """Frame i and its mask show scene i: frames are in time order, and each mask is with its picture."""
    ids = list(range(len(video.frame_names)))
    truth = np.stack([scene(i) for i in ids])
    assert np.array_equal(video.mask(video.expressions[0].anno_ids, ids), truth)
    assert np.array_equal(np.stack(video.frames(ids))[..., 0] > 127, truth)


ORDERS = {
    "sorted": list(range(FRAMES)),
    "as strings": sorted(range(FRAMES), key=str),
    "backward": list(range(FRAMES))[::-1],
    "shuffled": random.Random(0).sample(range(FRAMES), FRAMES),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["{}", "{:05d}", "frame{}", "f{:02d}x"])
def test_each_mask_stays_with_its_picture_in_time_order(tmp_path: Path, order: str, form: str) -> None:
    write_mevis(tmp_path, [form.format(i) for i in ORDERS[order]])
    assert_paired(*videos_of("mevis", tmp_path))


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".png", ".PNG", ".bmp"])
@pytest.mark.parametrize("listed", ["{}", "{}.jpg", "{}.JPEG", "{}.png"])
def test_frames_are_found_by_their_names_whatever_their_suffix(tmp_path: Path, suffix: str, listed: str) -> None:
    write_mevis(tmp_path, [str(i) for i in range(FRAMES)], suffix=suffix, listed=listed.format)
    (video,) = videos_of("mevis", tmp_path)
    assert_paired(video)
    assert video.frame_names == tuple(map(str, range(FRAMES))) and video.missing_file(range(FRAMES)) is None
    before = video.files_digest()
    shutil.copy(tmp_path / f"train/JPEGImages/v/3{suffix}", tmp_path / "train/JPEGImages/v/3.webp")
    again = videos_of("mevis", tmp_path)[0]
    if suffix == ".jpg":
        assert again.files_digest() == before
    else:
        with pytest.raises(DataError, match=r"the frame 3 is in 3\.\w+ too; remove one"):
            again.files_digest()


def palette_video(root: Path, names: list[str]) -> None:
    split = root / "train"
    for i, name in enumerate(names):
        save_frame(split / "JPEGImages/v" / f"{name}.jpg", i)
        (split / "Annotations/v").mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(i).astype(np.uint8)).save(split / "Annotations/v" / f"{name}.png")
    entry = {"frames": names[::-1], "expressions": {"0": {"exp": "it", "obj_id": "1"}}}
    (root / "meta_expressions/train").mkdir(parents=True)
    (root / "meta_expressions/train/meta_expressions.json").write_text(json.dumps({"videos": {"v": entry}}))


@pytest.mark.parametrize("form", ["{}", "{:05d}"])
def test_masks_that_go_by_name_stay_with_their_pictures(tmp_path: Path, form: str) -> None:
    palette_video(tmp_path, [form.format(i) for i in range(FRAMES)])
    assert_paired(*videos_of("ref_youtube_vos", tmp_path))


def listed_film(root: Path, *, masks: Any = None, frames: int = FRAMES, **more: Any) -> None:
    write_film(root / "film.mp4", frames=frames)
    given = {} if masks is None else {"masks": masks}
    entry = {"video": "film.mp4", "expressions": [{"text": "it", **given}], **more}
    (root / "train.jsonl").write_text(json.dumps(entry))


def save_masks(folder: Path, masks: list[np.ndarray]) -> None:
    folder.mkdir(exist_ok=True)
    for i, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(folder / f"{i}.png", compress_level=0)


def test_a_folder_of_masks_is_read_by_number(tmp_path: Path) -> None:
    masks = list(np.random.default_rng(0).random((FRAMES, 48, 64)) > 0.5)
    save_masks(tmp_path / "png", masks)
    listed_film(tmp_path, masks="png")
    (video,) = videos_of("videos", tmp_path)
    assert np.array_equal(video.mask(video.expressions[0].anno_ids, range(FRAMES)), np.stack(masks))


MEVIS = """{"videos": {"v": {"frames": ["0", "1"], "expressions": {"0": {"exp": "it", "anno_id": [0]}}}}}"""


def spoiled(tmp_path: Path, meta: str) -> str:
    write_mevis(tmp_path, ["0", "1"])
    (tmp_path / "train/meta_expressions.json").write_text(meta)
    with pytest.raises(DataError) as raised:
        videos_of("mevis", tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"frames": ["0", "1"]', '"frames": ["0", "1", "0"]', r"frames: '0' appears twice"),
        ('"frames": ["0", "1"]', '"frames": ["0", "0.jpg"]', r"frames: '0' appears twice"),
        ('"frames": ["0", "1"]', '"frames": ["a", "A"]', r"frames: 'a' appears twice"),
        ('"frames": ["0", "1"]', '"frames": ["0", "../1"]', "expected a name below"),
        ('"frames": ["0", "1"]', '"frames": ["0", ".."]', "expected a name below"),
        ('"frames": ["0", "1"]', '"frames": ["0", "a/1"]', "expected the name of a file"),
        ('"frames": ["0", "1"]', '"frames": ["0", "' + "1" * 260 + '"]', "the name of a file has at most 255 bytes"),
        ('"frames"', '"frames": [], "frames"', "the key 'frames' is in one object"),
        ('{"v": {', '{"v": {}, "v": {', "the key 'v' is in one object"),
        ('{"0": {', '{"0": {}, "0": {', "the key '0' is in one object"),
        ('{"videos": {', '{"videos": {}, "videos": {', "the key 'videos' is in one object"),
        ('{"v"', '{"../v"', "expected a name below"),
        ('{"v"', '{"/etc"', "expected a name below"),
        ('{"v"', '{"v//w"', "expected a name below"),
        ('{"v"', '{"' + "v" * 2000 + '"', "a name of more than 1000 characters"),
        ('"exp": "it"', '"exp": "&nbsp;"', "an empty sentence"),
        ('"exp": "it"', '"exp": "\\u200b\\u3164"', "an empty sentence"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_file_and_field(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert MEVIS.count(old) == 1
    message = spoiled(tmp_path, MEVIS.replace(old, new))
    assert said in message, message


def test_an_annotation_that_stands_twice_is_refused_though_its_file_is_read_member_by_member(tmp_path: Path) -> None:
    write_mevis(tmp_path, ["0", "1"])
    path = tmp_path / "train/mask_dict.json"
    path.write_text(path.read_text()[:-1] + ', "0": []}')
    with pytest.raises(DataError, match=r"mask_dict\.json: no valid JSON \(the key '0' is in one object twice"):
        videos_of("mevis", tmp_path)


def test_several_mistakes_are_told_together_the_first_of_them_by_name(tmp_path: Path) -> None:
    entry = json.loads(MEVIS)["videos"]["v"]
    bad = {**entry, "expressions": {str(i): {"exp": " ", "anno_id": [0]} for i in range(4)}}
    message = spoiled(tmp_path, json.dumps({"videos": {"good": entry, "a": bad, "b": bad}}))
    assert message.startswith(f"8 mistakes: {tmp_path}") and message.endswith("; and 3 more")
    assert [f"{name}.expressions.{i}.exp" in message for name, i in [*(("a", i) for i in range(4)), ("b", 0)]] == [
        True
    ] * 5


def refcoco(root: Path, change: Callable[[Any], None]) -> None:
    write_refcoco(root)
    path = root / "refcoco/instances_refcoco_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: [image.update(caption=" ") for image in c["images"]], r"^4 mistakes: .*images\[0\].caption"),
        (lambda c: c["annotations"][1].update(segmentation=[[0, 0, 5, 0, 5, 5]]), "two annotations of this id"),
        (lambda c: [image.update(file_name="../x.jpg") for image in c["images"]], "expected a name below"),
        (lambda c: c["images"][0].update(id=True), "id is 'True'; expected a int"),
        (lambda c: c["images"][0].update(original_id=10**30), "expected a int"),
    ],
)
def test_coco_form_is_held_to_the_same_rules(tmp_path: Path, change: Callable[[Any], None], said: str) -> None:
    refcoco(tmp_path, change)
    with pytest.raises(DataError, match=said):
        videos_of("refcoco", tmp_path, "refcoco/train")


def line(text: str = "it", video_id: str = "v", exp_ids: tuple[Any, ...] = (0,)) -> str:
    expressions = [{"exp_id": exp_id, "text": text} for exp_id in exp_ids]
    return json.dumps({"video": "film.mp4", "video_id": video_id, "expressions": expressions}, ensure_ascii=False)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
@pytest.mark.parametrize(("start", "end"), [("", "\n"), ("\ufeff", "\r\n"), ("\n\n", "\n \n")])
def test_lines_of_a_list_end_with_a_line_feed_alone(tmp_path: Path, separator: str, start: str, end: str) -> None:
    text = f"it{separator}moves"
    raw = json.dumps(separator)[1:-1] if separator < " " else separator  # JSON escapes control characters
    lines = [line(f"it{raw}moves").replace("\\\\", "\\"), line(video_id="w")]
    (tmp_path / "train.jsonl").write_text(start + end.join(lines) + end, encoding="utf-8")
    first, second = videos_of("videos", tmp_path)
    assert first.expressions[0].text == text and second.video_id == "w"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line(), line()], "video_id: 'v' names two videos"),
        ([line(video_id="1"), line().replace('"v"', "1")], "video_id: '1' names two videos"),
        ([line(exp_ids=("a", "b", "a"))], r"train\.jsonl:1: exp_id: 'a' names two expressions"),
        ([line(exp_ids=("1", 1))], "exp_id: '1' names two expressions"),
        ([line().replace('"v"', '"v", "video_id": "w"')], r"train\.jsonl:1: no valid JSON \(the key 'video_id'"),
        ([line(text='"""')], "an empty sentence"),
        (["{" * 5], r"train\.jsonl:1: no valid JSON"),
        (["[" * 200_000], r"train\.jsonl:1: no valid JSON"),
        ([line(), "7", "null", line(text=" ", video_id="w")], r"^3 mistakes: .*jsonl:2 .*jsonl:3 .*jsonl:4"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused_by_its_line(tmp_path: Path, lines: list[str], said: str) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=said) as raised:
        videos_of("videos", tmp_path)
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_is_no_part_of_any_file(tmp_path: Path) -> None:
    write_mevis(tmp_path, ["0", "1"])
    for path in (tmp_path / "train").glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_paired(*videos_of("mevis", tmp_path))


def test_annotations_that_are_no_regular_file_are_refused_at_once(tmp_path: Path) -> None:
    write_mevis(tmp_path, ["0", "1"])
    write_youtube(tmp_path)
    for path, source in [
        (tmp_path / "train/mask_dict.json", "mevis"),
        (tmp_path / "train/meta_expressions.json", "mevis"),
        (tmp_path / "meta_expressions/train/meta_expressions.json", "ref_youtube_vos"),
        (tmp_path / "train.jsonl", "videos"),
    ]:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(DataError, match="it is no regular file"):
            videos_of(source, tmp_path)
        path.unlink()


def built(make_config: Any, root: Path, out: Path) -> Any:
    config = make_config(out, clip={"frames": 5}, cache={"views": 1})
    return config.model_copy(update={"data": config.data.model_copy(update={"source": "videos", "root": root})})


def test_masks_in_files_are_part_of_a_caches_identity_and_older_caches_open_with_one_line(
    tmp_path: Path, make_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The new masks have the byte sizes of the old ones: the identity depends on content."""
    masks = [np.zeros((48, 64), bool) for _ in range(5)]
    for i, mask in enumerate(masks):
        mask[8:24, 4 * i : 4 * i + 16] = True
    save_masks(tmp_path / "png", masks)
    listed_film(tmp_path, masks="png", frames=5)
    config = built(make_config, tmp_path, tmp_path / "cache")
    build(config)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "png").iterdir())]
    save_masks(tmp_path / "png", [np.roll(mask, 8, axis=0) for mask in masks])
    assert [path.stat().st_size for path in sorted((tmp_path / "png").iterdir())] == sizes
    with pytest.raises(CacheError, match=r"another fingerprint \(data\.mask_files"):
        build(config)
    without_mask_files(tmp_path / "cache")
    build(config)
    assert "changed masks are not detected" in caplog.text


def without_mask_files(cache: Path) -> None:
    """Make a cache like an older one: its fingerprint names no mask files."""
    from flowmask.models.stored.sealed import seal, unseal

    path = cache / "plan/plan.json"
    plan = unseal(path.read_bytes())
    assert plan["fingerprint"]["fields"].pop("data.mask_files")
    plan["fingerprint"]["total"] = plan["fingerprint"]["masks"] = "0" * 64
    path.write_bytes(seal(plan))
    assert "data.mask_files" in read_manifest(cache).fingerprint.fields


def test_masks_in_the_list_itself_make_no_new_field(tmp_path: Path) -> None:
    listed_film(tmp_path, masks=[rle.encode(np.eye(48, 64, dtype=bool))] * FRAMES)
    source = open_source(DataSourceConfig(source="videos", root=tmp_path, split="train"))
    assert source.identity().keys() == {"expressions", "masks"}


@pytest.mark.parametrize("layout", ["masks in a folder", "masks by name", "mevis", "ref_youtube_vos"])
def test_a_relative_root_reads_as_the_absolute_one(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, source = tmp_path / "root", layout if layout in ("mevis", "ref_youtube_vos") else "videos"
    root.mkdir()
    if source == "mevis":
        write_mevis(root, [f"{i:03d}" for i in range(FRAMES)])
    elif source == "ref_youtube_vos":
        write_youtube(root)
    else:
        write_film(root / "film.mp4", frames=FRAMES)
        (root / "masks").mkdir()
        for i in range(FRAMES):
            Image.fromarray(np.eye(*FILM_SIZE, k=i, dtype=np.uint8)).save(root / "masks" / f"{i}.png")
        masks = "masks" if layout == "masks in a folder" else [f"masks/{i}.png" for i in range(FRAMES)]
        line = {"video": "film.mp4", "expressions": [{"text": "it", "masks": masks}]}
        (root / "train.jsonl").write_text(json.dumps(line))
    monkeypatch.chdir(tmp_path)
    absolute, relative = videos_of(source, root), videos_of(source, Path("root"))
    assert len(absolute) == len(relative) > 0
    for one, other in zip(absolute, relative, strict=True):
        ids, anno_ids = list(range(len(one.frame_names))), one.expressions[0].anno_ids
        assert np.array_equal(np.stack(one.frames(ids)), np.stack(other.frames(ids)))
        assert one.mask(anno_ids, ids).any() and np.array_equal(one.mask(anno_ids, ids), other.mask(anno_ids, ids))
