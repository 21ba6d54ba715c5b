"""The mechanism behind the results of every command: the owner of a folder, one writer, all results or none."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disturbed import FINISHED, KILLED, REFUSED, calls_of, contents, end_of, every_call, full_from, in_child, kill_at

from flowmask.models.errors import ConfigError
from flowmask.models.files import MARK, move_new, whole_file
from flowmask.models.folders import output_folder
from flowmask.models.folders.output_folder import Kind, OutputFolder, identity_of
from flowmask.models.folders.scratch import scratch

KIND = Kind("a heap", older=lambda path: ["heap"] if (path / "heap").is_file() else None, dots=(".own",))
OTHER = Kind("a pile", older=lambda path: None)


def publish(out: Path, number: int, *, names: tuple[str, ...] = ("a", "b")) -> None:
    """Two results and an index that all contain the number; `gone` removes results that are not made again."""
    folder = OutputFolder(out, KIND)
    with folder.held(), folder.scratch() as place:
        for name in names:
            (place / name / "deep").mkdir(parents=True)
            (place / name / "deep" / f"{number}.txt").write_text(f"{name} {number}")
        (place / "index").write_text(str(number))
        folder.swap(place, {name: place / name for name in (*names, "index")}, index="index", gone=("a", "b", "c"))


def test_a_folder_is_new_or_empty_or_ours_of_the_same_kind_or_refused_in_one_line(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "new" / "deep", KIND)
    (tmp_path / "empty").mkdir()
    OutputFolder(tmp_path / "empty", KIND)
    identity = identity_of(tmp_path / "empty")
    assert identity and identity != identity_of(tmp_path / "new" / "deep")
    OutputFolder(tmp_path / "empty", KIND)
    assert identity_of(tmp_path / "empty") == identity
    with pytest.raises(ConfigError, match="is a heap, not a pile"):
        OutputFolder(tmp_path / "empty", OTHER)
    (tmp_path / "full").mkdir()
    for name in ("notes.txt", ".own", ".lock", ".flowmask.files"):
        (tmp_path / "full" / name).write_text("mine")
        with pytest.raises(ConfigError, match=f"not a heap but holds {name}"):
            OutputFolder(tmp_path / "full", KIND)
        assert contents(tmp_path / "full") | {".lock": b""} == {name: b"mine"} | {".lock": b""}
        (tmp_path / "full" / name).unlink()
    (tmp_path / "full" / ".DS_Store").write_text("no result")
    OutputFolder(tmp_path / "full", KIND)


def test_a_damaged_mark_or_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    for number, text in enumerate(("", "{", "[]", '{"kind": 3}', "\x00")):
        out = tmp_path / str(number)
        out.mkdir()
        (out / MARK).write_text(text)
        with pytest.raises(ConfigError, match="damaged"):
            OutputFolder(out, KIND)
        assert (out / MARK).read_text() == text
    with pytest.raises(ConfigError, match="can't be written"):
        OutputFolder(tmp_path / "0" / MARK, KIND)


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("after", [False, True])
def test_a_mark_that_another_process_makes_at_any_moment_of_the_look_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, after: bool
) -> None:
    seen = 0

    def with_another(real: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: Path) -> Any:
            nonlocal seen
            mine, seen = seen == call and Path(path).name == MARK, seen + 1
            found = real(path) if after or not mine else None
            if mine:
                OutputFolder(tmp_path, KIND)
            return found if after or not mine else real(path)

        return look

    monkeypatch.setattr(os.path, "lexists", with_another(os.path.lexists))
    monkeypatch.setattr(output_folder, "read_object", with_another(output_folder.read_object))
    OutputFolder(tmp_path, KIND)
    assert identity_of(tmp_path)


def test_a_folder_from_before_marks_opens_and_its_files_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "heap").write_text("old")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    folder = OutputFolder(tmp_path, KIND)
    assert folder.strangers(["heap", "a"], by_content=True) == ["a/mine"]


def changed(out: Path, where: str) -> None:
    (out / where).parent.mkdir(parents=True, exist_ok=True)
    (out / where).write_text("mine")


@pytest.mark.parametrize("where", ["a/deep/1.txt", "a/mine", "b/deep/er/mine", "c", "c/mine", "index"])
def test_what_somebody_else_put_or_changed_is_neither_replaced_nor_deleted(tmp_path: Path, where: str) -> None:
    publish(tmp_path, 1)
    changed(tmp_path, where)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"{where} is no result of FlowMask, or was changed"):
        publish(tmp_path, 2)
    assert contents(tmp_path) == before


def test_a_link_in_the_place_of_a_result_is_not_followed(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    publish(out, 1)
    (out / "a").rename(other)
    (out / "a").symlink_to(other)
    with pytest.raises(ConfigError, match="no result of FlowMask"):
        publish(out, 2)
    assert contents(other) == {"deep/1.txt": b"a 1"}


@pytest.fixture
def states(tmp_path: Path) -> Callable[[Path], str]:
    """The complete set of results in a folder: "old" or "new"."""
    known = {}
    for name, numbers in {"old": (1,), "new": (1, 2)}.items():
        for number in numbers:
            publish(tmp_path / name, number, names=("a", "b") if number == 1 else ("a",))
        known[name] = contents(tmp_path / name)
    return lambda out: next(name for name, found in known.items() if contents(out) == found)


def again(out: Path) -> None:
    publish(out, 2, names=("a",))


def test_a_swap_killed_at_any_call_is_undone_or_done_by_the_next_holder(
    tmp_path: Path, states: Callable[[Path], str]
) -> None:
    publish(tmp_path / "first", 1)
    total = calls_of(lambda: again(tmp_path / "first"), counted=every_call)
    assert total > 40
    found = set()
    for number in range(1, total + 1):
        out = tmp_path / f"killed_{number}"
        publish(out, 1)
        assert kill_at(number, lambda out=out: again(out)) == KILLED
        with OutputFolder(out, KIND).held():
            found.add(states(out))
        again(out)
        assert states(out) == "new"
    assert found == {"old", "new"}


def test_a_disk_that_is_full_from_any_call_on_leaves_the_older_results_and_room_lets_it_finish(
    tmp_path: Path, states: Callable[[Path], str]
) -> None:
    for number in range(1, 100):
        out = tmp_path / f"full_{number}"
        publish(out, 1)
        if (code := full_from(number, lambda out=out: again(out))) == FINISHED:
            break
        assert code == REFUSED and states(out) == "old"
        again(out)
        assert states(out) == "new"
    assert number > 10


def test_a_rename_that_fails_takes_all_others_back(tmp_path: Path, states: Callable[[Path], str]) -> None:
    def refuse(number: int, out: Path) -> int:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            seen += event == "os.rename"
            if seen == number and event == "os.rename":
                raise OSError(errno.EIO, "the disk is ill")

        return end_of(in_child(lambda: again(out), hook=hook))

    for number in range(1, 100):
        out = tmp_path / f"ill_{number}"
        publish(out, 1)
        if (code := refuse(number, out)) == FINISHED:
            break
        assert code == REFUSED and states(out) == "old"
    assert number > 7


def test_there_is_one_writer_and_one_that_died_is_none(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, KIND)
    with folder.held(), pytest.raises(ConfigError, match=f"being written by process {os.getpid()} on"):
        folder.take(patience_s=0)
    dead = in_child(lambda: (folder.take(), os.kill(os.getpid(), 9)))
    assert end_of(dead) == KILLED
    with folder.held(patience_s=0):
        pass


def test_only_who_may_write_a_folder_may_open_its_lock(tmp_path: Path) -> None:
    for mode, wanted in ((0o755, 0o600), (0o700, 0o600), (0o775, 0o660), (0o777, 0o660)):
        out = tmp_path / oct(mode)
        folder = OutputFolder(out, KIND)
        out.chmod(mode)
        (out / ".lock").touch(0o666)  # as in earlier versions
        with folder.held():
            assert (out / ".lock").stat().st_mode & 0o777 == wanted


def test_planted_links_and_names_are_not_followed_or_deleted(tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("mine")
    folder = OutputFolder(out, KIND)
    (out / ".lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="can't be written"):
        folder.take()
    (out / ".lock").unlink()
    names = (".tmp-index.0123456789abcdef", f".flowmask-{'0' * 32}", f".tmp-x.{'1' * 32}{'2' * 16}")
    for name in names[::2]:
        (out / name).write_text("mine")
    (out / names[1]).mkdir()
    (out / names[1] / "mine").write_text("mine")
    (out / f".flowmask-{'3' * 32}").symlink_to(tmp_path)
    before = contents(out)
    publish(out, 1)
    assert before.items() <= contents(out).items() and victim.read_text() == "mine"


def test_a_scratch_is_private_and_goes_with_its_process(tmp_path: Path) -> None:
    with scratch(tmp_path) as place:
        assert place.stat().st_mode & 0o777 == 0o700
        with scratch(tmp_path):
            assert place.is_dir()

        def die() -> None:
            with scratch(tmp_path) as own:
                (own / "half").write_text("half")
                os.kill(os.getpid(), 9)

        assert end_of(in_child(die)) == KILLED and len(list(tmp_path.iterdir())) == 2
        with scratch(tmp_path) as other:
            assert set(tmp_path.iterdir()) == {place, other}
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_never_finished_goes_with_the_next_start_and_one_in_hand_stays(tmp_path: Path) -> None:
    OutputFolder(tmp_path, KIND)

    def die() -> None:
        with whole_file(tmp_path / "config.yaml") as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), 9)

    assert end_of(in_child(die)) == KILLED
    half = list(tmp_path.glob(".tmp-*"))
    with whole_file(tmp_path / "other") as file:
        file.write(b"whole")
        OutputFolder(tmp_path, KIND)
    assert len(half) == 1 and set(contents(tmp_path)) == {"other"}


def test_a_new_name_is_given_once_whoever_comes_second(tmp_path: Path) -> None:
    for made in ("file", "folder"):
        for there in ("file", "folder", "link"):
            source, target = tmp_path / f"{made}-{there}", tmp_path / f"{made}-{there}-there"
            (source.mkdir() or (source / "x").touch()) if made == "folder" else source.write_text("new")
            {"file": target.touch, "folder": target.mkdir, "link": lambda t=target: t.symlink_to("nowhere")}[there]()
            if there == "folder":
                (target / "mine").touch()
            with pytest.raises(FileExistsError):
                move_new(source, target)
            assert source.exists() and os.path.lexists(target)


def test_a_plan_that_a_stranger_wrote_moves_nothing_out_of_the_folder(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    for number, (name, source) in enumerate(
        [("a", "../victim/x"), ("a", "link/x"), ("../x", "a"), ("a", str(victim / "x"))]
    ):
        out = tmp_path / str(number)
        publish(out, 1)
        (out / "link").symlink_to(victim)
        hexed = f"{number:032x}"
        place = out / f".flowmask-{hexed}"
        (place / ".old").mkdir(parents=True)
        for file in (f"lock-{hexed}", ".flowmask.files"):
            (place / file).touch()
        (place / ".swap.json").write_text(json.dumps({name: source}))
        with pytest.raises(ConfigError, match="leads out of it"):
            publish(out, 2)
        assert not list(victim.iterdir()) and (out / "a" / "deep" / "1.txt").exists()


def test_two_at_once_end_whole_one_after_the_other(tmp_path: Path) -> None:
    for name in "abcde":
        out = tmp_path / name
        children = [in_child(lambda n=n, out=out: publish(out, n, names=("a",))) for n in range(4)]
        assert [end_of(child) for child in children] == [FINISHED] * 4
        assert set(contents(out)) == {".flowmask.files", "index", f"a/deep/{(out / 'index').read_text()}.txt"}
