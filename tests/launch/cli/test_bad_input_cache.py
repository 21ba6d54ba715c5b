"""A user's mistake with a cache: one line that names it, exit code 2, and no byte of the user's lost or changed."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from seals import rewrite

from flowmask.launch.cli import main as cli

DATASET = Path(__file__).parents[2] / "golden" / "parity" / "e2e" / "data" / "valid_u"
SMALL = "clip: {sampling: whole, short_side: 32, long_side: 32, size_multiple: 16, augment: false}\n"
CONFIG = "out: cache\nmodel: {wan: wan}\ndata: {source: mevis, root: data, split: train}\n"

Mutation = Callable[[Path], object]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, weights, a config and the cache built from them; tests use copies."""
    from flowmask.models.weights.tiny_wan import write_tiny_wan

    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(DATASET, folder / "data" / "train")
    write_tiny_wan(folder / "wan", random_vae=True)
    (folder / "cache.yaml").write_text(CONFIG + SMALL + "launch: {cluster: debug}\n")
    (folder / "occupied").write_text("a file where a folder is wanted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        patch.setattr(sys, "argv", ["flowmask", "cache", "build", "cache.yaml"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None)
    return folder


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `world` with a link to its weights. Jobs run in this process, as their only rank."""
    for name in ("data", "cache"):
        shutil.copytree(world / name, tmp_path / name)
    for name in ("cache.yaml", "occupied"):
        shutil.copy(world / name, tmp_path)
    (tmp_path / "wan").symlink_to(world / "wan")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return tmp_path


def run(*words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code of a command, and its stderr."""
    monkeypatch.setattr(sys, "argv", ["flowmask", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.err


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: str, change: Callable[[dict], object]) -> Mutation:
    def mutate(place: Path) -> None:
        if path.endswith("manifest.json"):
            rewrite(place / path, change)
            return
        content = json.loads((place / path).read_text())
        change(content)
        (place / path).write_text(json.dumps(content))

    return mutate


def both(*mutations: Mutation) -> Mutation:
    return lambda place: [mutate(place) for mutate in mutations]


def write(path: str, text: str) -> Mutation:
    return lambda place: (place / path).write_text(text)


def remove(path: str) -> Mutation:
    def mutate(place: Path) -> None:
        target = place / path
        shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()

    return mutate


def first_frame(place: Path) -> Path:
    return sorted((place / "data" / "train" / "JPEGImages" / "vidA").iterdir())[0]


def other_size(masks: dict) -> None:
    for rles in masks.values():
        for rle in filter(None, rles):
            rle["size"] = [rle["size"][0] + 1, rle["size"][1]]


def sentence(value: object) -> Mutation:
    return edit(META, lambda meta: meta["videos"]["vidA"]["expressions"]["0"].update(exp=value))


def other_weights(place: Path) -> None:
    from flowmask.models.weights.tiny_wan import write_tiny_wan

    write_tiny_wan(place / "wan2", seed=1, random_vae=True)


def leak(place: Path) -> None:
    (place / "data" / "valid").mkdir()
    write("data/valid/meta_expressions.json", '{"videos": {"vidA": {}}}')(place)


def other_fingerprint(place: Path) -> None:
    shutil.copytree(place / "cache", place / "other")
    change = {"total": "0" * 64}
    edit("other/manifest.json", lambda m: m["fingerprint"].update(change, fields={"cache.seed": 7}))(place)


nothing: Mutation = lambda place: None  # noqa: E731 - a row without damage
META, MASKS, SHARD = ("data/train/meta_expressions.json", "data/train/mask_dict.json", "cache/shards/000000.tar")
BUILD = ["cache", "build", "cache.yaml", "out=new"]
EXTEND = ["cache", "build", "cache.yaml"]
VERIFY, REPAIR = ["cache", "verify", "cache"], ["cache", "repair", "cache"]
INSPECT = ["cache", "inspect", "cache", "--out", "page.html"]
CASES: dict[str, tuple[Mutation, list[str], str]] = {
    "no config": (remove("cache.yaml"), BUILD, "cache.yaml does not exist"),
    "config that is no YAML": (write("cache.yaml", "out: [1"), BUILD, "not valid YAML"),
    **{
        f"config that is {text!r}": (write("cache.yaml", text), BUILD, "holds no keys; it must be a YAML mapping")
        for text in ("", "{}", "5", "1.5", "true", "a text", "[1, 2]", "!!set {a, b}", "!!binary aGk=", "2024-01-01")
    },
    "config without weights": (write("cache.yaml", "out: x\ndata: {root: data}\n"), BUILD, "model is missing"),
    "misspelt key": (nothing, [*BUILD, "cache.veiws=3"], "did you mean cache.views"),
    "override without a value": (nothing, [*BUILD, "cache.views"], "is not KEY=VALUE"),
    "a word for a number": (nothing, [*BUILD, "cache.views=many"], "cache.views is 'many'"),
    "no views": (nothing, [*BUILD, "cache.views=0"], "cache.views is 0"),
    "frames that the VAE cannot take": (nothing, [*BUILD, "clip.frames=6"], "Nearest: 5 or 9"),
    "sides that the DiT cannot take": (nothing, [*BUILD, "clip.size_multiple=24"], "multiple of 16"),
    "short side above long side": (nothing, [*BUILD, "clip.short_side=64"], "larger than long_side 32"),
    "unknown source": (nothing, [*BUILD, "data.source=mewis"], "known: "),
    "unknown handling of leaks": (nothing, [*BUILD, "cache.leaks=ignore"], "cache.leaks is 'ignore'"),
    "missing dataset": (remove("data"), BUILD, "no such dataset folder"),
    "missing split": (nothing, [*BUILD, "data.split=trian"], "data holds train"),
    "missing frames": (remove("data/train/JPEGImages"), BUILD, "JPEGImages is missing"),
    "missing sentences": (remove(META), BUILD, "meta_expressions.json"),
    "missing masks": (remove(MASKS), BUILD, "has no masks"),
    "broken sentences": (write(META, '{"videos": '), BUILD, "meta_expressions.json"),
    "broken masks": (write(MASKS, '{"1": [nul'), BUILD, "mask_dict.json"),
    "masks that are a list": (write(MASKS, "[]"), BUILD, "mask_dict.json"),
    "no video at all": (write(META, '{"videos": {}}'), BUILD, "is empty"),
    "sentence without words": (sentence(" "), BUILD, "expressions.0"),
    "sentence that is a number": (sentence(7), BUILD, "expressions.0"),
    "unknown annotation": (
        edit(META, lambda m: m["videos"]["vidA"]["expressions"]["0"].update(anno_id=[99])), BUILD, "99",
    ),
    "masks of another size": (edit(MASKS, other_size), BUILD, "mask_dict.json"),
    "missing frame": (lambda p: first_frame(p).unlink(), BUILD, "00000.jpg"),
    "frame that is no image": (lambda p: first_frame(p).write_text("no image"), BUILD, "00000.jpg"),
    "truncated frame": (lambda p: os.truncate(first_frame(p), 700), BUILD, "00000.jpg"),
    "missing weights": (remove("wan"), BUILD, "wan is not a folder"),
    "weights of nothing": (nothing, [*BUILD, "model.wan=data"], "data"),
    "output below a file": (nothing, [*BUILD, "out=occupied/cache"], "occupied"),
    "leak": (leak, BUILD, "vidA (valid)"),
    "held-out split that is not there": (
        nothing, [*BUILD, "cache.held_out=[{source: mevis, root: data, split: valid}]"], "no such split",
    ),
    "other seed": (nothing, [*EXTEND, "cache.seed=7"], "cache.seed: 0 there, 7 asked for"),
    "two other settings": (nothing, [*EXTEND, "cache.views=2", "cache.dtype=float32"], "cache.views: 1 there"),
    "other weights": (other_weights, [*EXTEND, "model.wan=wan2"], "model.vae"),
    "other sentences": (sentence("a zebra"), EXTEND, "data.expressions"),
    "verify what is not there": (nothing, ["cache", "verify", "nothing"], "no such cache folder"),
    "verify a dataset": (nothing, ["cache", "verify", "data"], "data is no cache; give the `out`"),
    "verify an unfinished build": (remove("cache/manifest.json"), VERIFY, "has not finished"),
    "verify with another VAE": (other_weights, [*VERIFY, "--wan", "wan2"], "is not the VAE that made"),
    "verify against another cache": (other_fingerprint, [*VERIFY, "--against", "other"], "cache.seed"),
    "verify against nothing": (nothing, [*VERIFY, "--against", "nothing"], "no such cache folder"),
    "repair what is not there": (nothing, ["cache", "repair", "nothing"], "no such cache folder"),
    "repair an unfinished build": (remove("cache/manifest.json"), REPAIR, "has not finished"),
    "repair without a config": (both(remove(SHARD), remove("cache/config.yaml")), REPAIR, "--config"),
    "repair with a broken config": (both(remove(SHARD), write("cache/config.yaml", "[")), REPAIR, "not valid YAML"),
    "repair without the dataset": (both(remove(SHARD), remove("data")), REPAIR, "no such dataset folder"),
    "repair without the weights": (both(remove(SHARD), remove("wan")), REPAIR, "wan is not a folder"),
    "repair with another seed": (remove(SHARD), [*REPAIR, "cache.seed=7"], "cache.seed: 0 there, 7 asked for"),
    "repair from other sentences": (both(remove(SHARD), sentence("a zebra")), REPAIR, "data.expressions"),
    "repair a unit that there is not": (nothing, [*REPAIR, "--unit", "99"], "has no unit 99"),
    "inspect what is not there": (nothing, ["cache", "inspect", "no", "--out", "page.html"], "no such cache folder"),
    "inspect into a folder": (nothing, ["cache", "inspect", "cache", "--out", "data"], "is a folder"),
    "inspect a cut shard": (lambda p: os.truncate(p / SHARD, 900), INSPECT, "000000.tar"),
    "inspect without an index": (remove("cache/index.npy"), INSPECT, "index.npy"),
    "inspect a broken manifest": (write("cache/manifest.json", "{"), INSPECT, "manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_with_exit_code_2_and_nothing_is_lost(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, words, named = CASES[name]
    mutate(place)
    before = snapshot(place)
    code, said = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    lines = [line for line in said.splitlines() if line.startswith("flowmask: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert named in lines[0], lines[0]
    after = snapshot(place)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after.keys() - before.keys() if path.is_relative_to(place / "cache")]


def test_the_table_is_long() -> None:
    assert len(CASES) >= 30


def test_verify_and_repair_say_what_they_do_and_leave_by_their_codes(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = snapshot(place / "cache")

    def said(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["flowmask", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    code, out = said(*VERIFY, "--json", "--decode-masks", "2")
    report = json.loads(out.splitlines()[-1])
    assert code == 0 and report["ok"] and len(report["masks"]) == 2
    code, out = said(*VERIFY, "--against", "cache")
    assert code == 0 and "identical" in out
    code, out = said(*REPAIR)
    assert code == 0 and "nothing to repair" in out
    content = bytearray((place / SHARD).read_bytes())
    content[3000] ^= 1
    (place / SHARD).write_bytes(content)
    code, out = said(*VERIFY, "--json")
    report = json.loads(out.splitlines()[-1])
    assert code == 1 and [(p["file"], p["unit"]) for p in report["problems"]] == [(SHARD, 0)]
    code, out = said(*VERIFY)
    assert code == 1 and f"wrong  {SHARD}: " in out and "flowmask cache repair cache" in out
    code, out = said(*REPAIR)
    assert code == 0 and "repaired" in out and "the same bytes" in out
    assert snapshot(place / "cache") == whole
