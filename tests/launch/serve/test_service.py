"""Visitors of the page: one prediction at a time, each sees only its own, and no file of a past visitor stays."""

import random
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from film import write_film
from served import until
from trials import SEED, TRIALS

from flowmask.launch.serve import service as service_module
from flowmask.launch.serve.limits import MIB, LimitError, Limits
from flowmask.launch.serve.service import Found, PersonLeftError, Service
from flowmask.models.errors import ConfigError

PATIENCE_S = 60.0


class Predicting:
    """Replaces `predict`: writes the sentences into files with the right names, step by step."""

    def __init__(self) -> None:
        self.inside, self.most_inside, self.order = 0, 0, list[str]()
        self.go = threading.Event()  # while it is cleared, a prediction runs until its visitor leaves
        self.go.set()
        self._lock = threading.Lock()

    def __call__(self, video: Path, prompts: list[str], *, out: Path, on_progress: Any, say: Any) -> Any:
        with self._lock:
            self.inside += 1
            self.most_inside = max(self.inside, self.most_inside)
            self.order.append(prompts[0])
        try:
            on_progress("windows", 0, 1)
            while not self.go.wait(0.005):
                on_progress("windows", 0, 1)
            on_progress("windows", 1, 1)
            return self._write(video, prompts, out)
        finally:
            with self._lock:
                self.inside -= 1

    def _write(self, video: Path, prompts: list[str], out: Path) -> Any:
        out.mkdir(parents=True)
        (out / ".lock").touch()
        (out / "overlay.mp4").write_text("+".join(prompts))
        facts = f'"video": "{video}", "checkpoint": "/home/me/runs/mine"'
        entries = ", ".join(f'{{"prompt": "{prompt}", {facts}}}' for prompt in prompts)
        (out / "predictions.json").write_text(f'{{{facts}, "prompts": [{entries}]}}')
        for prompt in prompts:
            (out / prompt).mkdir()
            (out / prompt / "00000.png").write_text(f"mask of {prompt}")
        made = [SimpleNamespace(prompt=prompt, masks=out / prompt) for prompt in prompts]
        return SimpleNamespace(overlay=out / "overlay.mp4", frame_names=["00000"], prompts=made)


@pytest.fixture
def predicting() -> Predicting:
    return Predicting()


@pytest.fixture
def service(predicting: Predicting, tmp_path: Path) -> Service:
    (tmp_path / "files").mkdir()
    write_film(tmp_path / "given.mp4", frames=3)
    limits = Limits(megabytes=1, seconds=1, sentences=3, waiting=2)
    return Service(predicting, folder=tmp_path / "files", clips={"given.mp4": tmp_path / "given.mp4"}, limits=limits)


def upload(service: Service, tmp_path: Path, *, content: str = "0") -> Path:
    """A clip as Gradio stores it: in a folder named after its content."""
    folder = tmp_path / "files" / f"content-{content}"
    folder.mkdir(exist_ok=True)
    if not (folder / "clip.mp4").exists():
        write_film(folder / "clip.mp4", frames=3)
    return folder / "clip.mp4"


def find(service: Service, who: str, video: Path | None, text: str) -> Found:
    return service.find(who, video, text, tell=lambda what, done, total: None)


class Asking:
    """A request in a separate thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def end(self) -> "Asking":
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self


def left_in(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "files").rglob("*"))


def test_the_zip_holds_all_results_and_no_path_of_this_machine(service: Service, tmp_path: Path) -> None:
    found = find(service, "me", upload(service, tmp_path), "dog\ncat")
    with zipfile.ZipFile(found.everything) as archive:
        names = {"overlay.mp4", "predictions.json", "dog/00000.png", "cat/00000.png"}
        assert set(archive.namelist()) == names
        assert archive.read("dog/00000.png") == b"mask of dog"
        said = archive.read("predictions.json").decode()
    assert str(tmp_path) not in said and "/home/me" not in said and '"clip.mp4"' in said and '"mine"' in said
    assert {sentence: list(frames) for sentence, frames in found.masks.items()} == {
        "dog": ["frame 1"],
        "cat": ["frame 1"],
    }


def test_requests_are_done_one_at_a_time_in_the_order_in_which_they_came(
    service: Service, predicting: Predicting, tmp_path: Path
) -> None:
    clip = upload(service, tmp_path)
    predicting.go.clear()
    asked = []
    for number, who in enumerate("abc"):
        asked.append(Asking(lambda who=who: find(service, who, clip, who)))  # type: ignore[misc]
        until(lambda number=number: len(service._turns._line) == number + 1)  # type: ignore[misc]
    with pytest.raises(LimitError, match="3 requests are ahead of yours"):
        find(service, "d", clip, "d")
    predicting.go.set()
    results = [one.end().result for one in asked]
    assert predicting.order == ["a", "b", "c"] and predicting.most_inside == 1
    assert [result.overlay.read_text() for result in results] == ["a", "b", "c"]


def test_a_person_has_one_request_at_a_time(service: Service, predicting: Predicting, tmp_path: Path) -> None:
    clip = upload(service, tmp_path)
    predicting.go.clear()
    first = Asking(lambda: find(service, "me", clip, "dog"))
    until(lambda: predicting.inside == 1)
    with pytest.raises(LimitError, match="still running"):
        find(service, "me", clip, "cat")
    predicting.go.set()
    assert first.end().result is not None
    assert find(service, "me", clip, "cat").overlay.read_text() == "cat"


def test_a_new_result_takes_the_place_of_the_last_one_of_that_person_alone(service: Service, tmp_path: Path) -> None:
    clip = upload(service, tmp_path)
    mine, yours = find(service, "me", clip, "dog"), find(service, "you", clip, "dog")
    again = find(service, "me", clip, "cat")
    assert not mine.overlay.exists() and yours.overlay.exists() and again.overlay.exists()


def test_what_is_at_work_is_not_taken_for_old(
    service: Service, predicting: Predicting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicting.go.clear()
    asked = Asking(lambda: find(service, "me", upload(service, tmp_path), "dog"))
    until(lambda: predicting.inside == 1)
    monkeypatch.setattr(service_module, "KEPT_S", -1.0)
    service.make_room()
    predicting.go.set()
    assert asked.end().result.overlay.is_file()


@pytest.mark.parametrize("waiting", [False, True])
def test_who_leaves_ends_the_request_and_leaves_no_file(
    service: Service, predicting: Predicting, tmp_path: Path, waiting: bool
) -> None:
    predicting.go.clear()
    first = Asking(lambda: find(service, "first", upload(service, tmp_path, content="1"), "dog"))
    until(lambda: predicting.inside == 1)
    second = Asking(lambda: find(service, "second", upload(service, tmp_path, content="2"), "cat"))
    until(lambda: len(service._turns._line) == 2)
    leaves, stays = (second, first) if waiting else (first, second)
    service.leave("second" if waiting else "first")
    assert isinstance(leaves.end().error, PersonLeftError)
    predicting.go.set()
    assert stays.end().result.overlay.is_file()
    service.leave("first")
    service.leave("second")
    assert left_in(tmp_path) == []


def test_a_clip_that_two_people_sent_stays_until_both_have_left(service: Service, tmp_path: Path) -> None:
    clip = upload(service, tmp_path)
    for who in ("me", "you"):
        service.look(who, clip)
    service.leave("me")
    assert find(service, "you", clip, "dog").overlay.is_file()
    service.leave("you")
    assert left_in(tmp_path) == []


def test_a_clip_of_the_list_is_copied_for_each_person_and_no_other_name_is(service: Service, tmp_path: Path) -> None:
    mine, yours = service.lend("me", "given.mp4"), service.lend("you", "given.mp4")
    assert mine != yours and mine.read_bytes() == (tmp_path / "given.mp4").read_bytes()
    for name in ("../given.mp4", str(tmp_path / "given.mp4"), "", "other.mp4"):
        with pytest.raises(LimitError, match="there is no clip"):
            service.lend("me", name)
    service.leave("me")
    assert not mine.exists() and yours.exists() and (tmp_path / "given.mp4").exists()


def test_files_that_are_no_upload_are_not_read_and_not_removed(service: Service, tmp_path: Path) -> None:
    (tmp_path / "files" / "link.mp4").symlink_to(tmp_path / "given.mp4")
    for video in (tmp_path / "given.mp4", tmp_path / "files" / ".." / "given.mp4", tmp_path / "files" / "link.mp4"):
        with pytest.raises(LimitError, match="removed from the server"):
            find(service, "me", video, "dog")
    service.leave("me")
    assert (tmp_path / "given.mp4").exists()
    with pytest.raises(LimitError, match="there is no clip; upload one"):
        find(service, "me", None, "dog")


def test_errors_name_the_clip_and_not_where_it_lies(service: Service, tmp_path: Path) -> None:
    (tmp_path / "files" / "notes.mp4").write_text("no video")
    with pytest.raises(LimitError, match=r"^notes\.mp4: no readable video") as raised:
        service.look("me", tmp_path / "files" / "notes.mp4")
    assert str(tmp_path) not in str(raised.value)


def test_a_prediction_that_fails_leaves_no_file_and_the_next_one_works(
    service: Service, predicting: Predicting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = upload(service, tmp_path)
    before = left_in(tmp_path)

    def fail(*_: Any) -> None:
        raise ConfigError("the GPU's free memory does not hold it")

    with monkeypatch.context() as patch, pytest.raises(LimitError, match="does not hold it"):
        patch.setattr(predicting, "_write", fail)
        find(service, "me", clip, "dog")
    assert left_in(tmp_path) == before
    assert find(service, "me", clip, "dog").overlay.is_file()


def test_the_folder_is_bounded_and_what_nobody_fetches_goes(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find(service, "silent", upload(service, tmp_path), "dog")
    stray = tmp_path / "files" / "stray"
    stray.mkdir()
    with (stray / "huge.mp4").open("wb") as file:
        file.truncate(20 * MIB)
    with pytest.raises(LimitError, match="no room for more clips"):
        service.make_room()
    assert found.overlay.exists() and stray.exists()
    (tmp_path / "files" / "tmp123").touch()
    for name in ("KEPT_S", "STRAY_S"):
        monkeypatch.setattr(service_module, name, -1.0)
    service.make_room()
    assert left_in(tmp_path) == []


def test_closing_ends_all_requests(service: Service, predicting: Predicting, tmp_path: Path) -> None:
    clip = upload(service, tmp_path)
    predicting.go.clear()
    asked = [Asking(lambda who=who: find(service, who, clip, who)) for who in "ab"]  # type: ignore[misc]
    until(lambda: len(service._turns._line) == 2)
    service.close(patience_s=PATIENCE_S)
    assert all(isinstance(one.end().error, PersonLeftError) for one in asked)
    assert left_in(tmp_path) == []


def test_a_clip_stays_while_a_request_of_one_who_left_reads_it(
    service: Service, predicting: Predicting, tmp_path: Path
) -> None:
    clip, reads, go = upload(service, tmp_path), threading.Event(), threading.Event()

    def read_slowly(*_: Any, **__: Any) -> Any:
        reads.set()
        assert go.wait(PATIENCE_S)
        return clip.read_bytes()

    service._segment = read_slowly
    first = Asking(lambda: find(service, "first", clip, "dog"))
    assert reads.wait(PATIENCE_S)
    second = Asking(lambda: find(service, "second", clip, "cat"))
    until(lambda: len(service._turns._line) == 2)
    service.leave("first")
    service.leave("second")
    assert isinstance(second.end().error, PersonLeftError)
    assert clip.exists()
    go.set()
    first.end()
    assert left_in(tmp_path) == []


def _visit(service: Service, who: str, draws: random.Random, *, tmp_path: Path) -> Iterator[None]:
    """The actions of one visitor, step by step."""
    clip = tmp_path / "files" / f"content-{draws.choice('12')}" / "clip.mp4"
    for request in range(draws.randrange(1, 4)):
        try:
            clip = service.lend(who, "given.mp4") if draws.random() < 0.3 else clip
            found = find(service, who, clip, f"{who} {request}")
            assert found.overlay.read_text() == f"{who} {request}"
        except (PersonLeftError, LimitError):  # left, no free place, or a shared upload is gone
            pass
        yield


@pytest.mark.parametrize("trial", range(TRIALS))
def test_whatever_people_do_none_sees_another_and_nothing_is_left_of_them(
    service: Service, predicting: Predicting, tmp_path: Path, trial: int
) -> None:
    names = [f"person{i}" for i in range(6)]
    for content in "12":
        upload(service, tmp_path, content=content)

    def live(who: str) -> None:
        draws = random.Random(f"{SEED} {trial} {who}")
        for _ in _visit(service, who, draws, tmp_path=tmp_path):
            if draws.random() < 0.2:
                service.leave(who)

    everybody = [Asking(lambda who=who: live(who)) for who in names]  # type: ignore[misc]
    draws = random.Random(f"{SEED} {trial}")
    for who in draws.choices(names, k=10):
        service.leave(who)
    assert [one.end().error for one in everybody] == [None] * len(names)
    for who in names:
        service.leave(who)
    assert predicting.most_inside == 1
    assert [path for path in left_in(tmp_path) if path.is_file() and "content-" not in str(path)] == []
