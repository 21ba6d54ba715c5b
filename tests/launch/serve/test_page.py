"""The real page in a real browser, with real weights: its text, its results and its files."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from served import DONE, PATIENCE_S, Served, request, served, until, visit

SENTENCES = ["the red car", "the <b>dog</b> on the left"]


@pytest.fixture(scope="module")
def site(chromium: Any, lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    limits = ("--max-seconds", 2, "--max-megabytes", 1, "--max-sentences", 2)
    options = ("--port", 0, "--out", folder / "out", "--clips", lab / "clips", "--device", "cpu", *limits)
    with served(folder, "-m", "flowmask", "serve", lab / "export", *options) as site:
        yield site


def test_the_page_gives_what_predict_gives_byte_for_byte(
    chromium: Any, site: Served, lab: Path, tmp_path: Path
) -> None:
    with visit(chromium, site.url) as me:
        me.upload(lab / "film12.mp4")
        me.says("64x48 px, 12 frames, 1.2 s")
        me.ask("\n\n".join(SENTENCES))
        me.page.wait_for_function(DONE)
        me.page.wait_for_function("document.querySelector('#overlay video')?.readyState >= 2")
        me.page.wait_for_function(
            "(images => images.length == 12 && images.every(image => image.naturalWidth == 64))"
            "([...document.querySelectorAll('#masks img')])"
        )
        assert me.page.locator("#masks h3").all_inner_texts() == SENTENCES
        with me.download() as archive:
            found = {name: archive.read(name) for name in archive.namelist()}
        me.page.set_viewport_size({"width": 400, "height": 800})
        assert me.page.evaluate("document.documentElement.scrollWidth") <= 400
    words = ["-m", "flowmask", "predict", lab / "film12.mp4", *SENTENCES, "--checkpoint", lab / "export"]
    command = [sys.executable, *map(str, (*words, "--out", tmp_path / "p"))]
    subprocess.run(command, env=site.environment, check=True, capture_output=True, timeout=PATIENCE_S)
    paths = (path for path in (tmp_path / "p").rglob("*") if path.is_file() and not path.name.startswith("."))
    predicted = {str(path.relative_to(tmp_path / "p")): path.read_bytes() for path in paths}
    assert found.keys() == predicted.keys() and sum(name.endswith(".png") for name in found) == 24
    said, expected = (json.loads(of.pop("predictions.json")) for of in (found, predicted))
    assert found == predicted
    for entry in (expected, *expected["prompts"]):
        entry |= {"video": "film12.mp4", "checkpoint": "export"}
    assert said == expected


def test_each_limit_is_one_line_on_the_page_and_the_page_goes_on(
    chromium: Any, site: Served, lab: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.mp4").write_text("no video")
    (tmp_path / "big.mp4").write_bytes(bytes(1_500_000))
    with visit(chromium, site.url) as me:
        me.ask("the dog")
        me.says("Error: there is no clip; upload one first")
        me.upload(tmp_path / "big.mp4")
        me.says("exceed the maximum allowed size of 1.0 Mb")
        me.upload(tmp_path / "notes.mp4")
        me.says("Error: notes.mp4: no readable video")
        me.ask("the dog")
        me.says("Error: notes.mp4: no readable video")
        me.page.click("#clip button[aria-label=Clear]")
        me.upload(lab / "film21.mp4")
        me.says("Error: the clip is 2.1 s long; at most 2 s are accepted: shorten it")
        for text, line in (
            (" \n ", "there is no sentence"),
            ("a\nb\nc", "there are 3 sentences; at most 2 are accepted"),
            ("x" * 301, "has 301 characters; at most 300 are accepted"),
            ("!", "is empty"),
            ("the dog", "the clip is 2.1 s long"),
        ):
            if text != "!":
                me.ask(text)
                me.says(f"Error: {line}" if not line.startswith("has") else line)
        me.page.click("#clips input")
        me.page.click("text=given.mp4")
        me.says("64x48 px, 9 frames, 0.9 s")
        me.ask("the dog")
        me.page.wait_for_function(DONE)


def test_a_hostile_name_of_a_file_is_only_a_name(chromium: Any, site: Served, lab: Path) -> None:
    name = '../../<img src=x onerror=alert(1)>"\u202e gpj.mp4'
    with visit(chromium, site.url) as me:
        me.upload({"name": name, "mimeType": "video/mp4", "buffer": (lab / "film9.mp4").read_bytes()})
        me.says("64x48 px, 9 frames, 0.9 s")
        assert all(path.is_relative_to(site.folder / "out") for path in site.files())
        me.ask("the dog")
        me.page.wait_for_function(DONE)
        with me.download() as archive:
            said = archive.read("predictions.json").decode()
        assert str(site.folder) not in said and "/" not in json.loads(said)["video"]


def test_two_people_at_once_see_their_own_and_leave_nothing(chromium: Any, site: Served, lab: Path) -> None:
    with visit(chromium, site.url) as me, visit(chromium, site.url) as you:
        for who, sentence in ((me, "mine"), (you, "yours")):
            who.upload(lab / "film9.mp4")
            who.says("64x48 px, 9 frames, 0.9 s")
            who.ask(sentence)
        for who, sentence in ((me, "mine"), (you, "yours")):
            who.page.wait_for_function(DONE)
            assert who.page.locator("#masks h3").all_inner_texts() == [sentence]
            with who.download() as archive:
                assert {name.partition("/")[0] for name in archive.namelist() if "/" in name} == {sentence}
        assert site.files()
    until(lambda: not site.files())


def test_neither_the_page_nor_its_process_asks_another_machine(chromium: Any, site: Served, lab: Path) -> None:
    before = site.outward
    with visit(chromium, site.url) as me:
        me.upload(lab / "film9.mp4")
        me.says("64x48 px, 9 frames, 0.9 s")
        me.ask("the dog")
        me.page.wait_for_function(DONE)
        hosts = {urlsplit(url).netloc for url in me.asked if not url.startswith(("data:", "blob:"))}
        assert hosts == {urlsplit(site.url).netloc}
        with socket.create_server(("127.0.0.1", 0)) as other:
            elsewhere = f"http://127.0.0.1:{other.getsockname()[1]}/"
            fetched = "url => fetch(url, {mode: 'no-cors', signal: AbortSignal.timeout(5000)})"
            fetched += ".then(() => 'fetched', error => `${error}`)"
            assert "TypeError" in me.page.evaluate(fetched, elsewhere)
            other.setblocking(False)
            with pytest.raises(BlockingIOError):  # no connection came
                other.accept()
    assert site.outward == before
    assert list((site.folder / "here").iterdir()) == []


@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"])
def test_no_file_but_uploads_and_results_is_served(site: Served, lab: Path, route: str) -> None:
    (place,) = (site.folder / "out").glob(".flowmask-*")
    (lock,) = place.glob("lock-*")
    inside = place / "files"
    paths = (
        *(
            "/etc/passwd",
            "../../../../../../etc/passwd",
            "..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
            "%2e%2e/%2e%2e/etc/passwd",
        ),
        *(
            "//etc/passwd",
            "file:///etc/passwd",
            "http://192.0.2.1/x",
            "log.txt",
            f"{inside}/%00/etc/passwd",
            inside,
            lock,
        ),
        *(f"{inside}/../../../log.txt", f"{inside}/..%2f..%2f..%2flog.txt", f"{inside}%2f..%2f{lock.name}"),
        *(lab / "film9.mp4", lab / "clips" / "given.mp4", lab / "export" / "flowmask.json"),
    )
    for path in paths:
        status, body = request(site, "GET", f"{route}{path}")
        assert status in (400, 403, 404), (route, path, status)
        assert "root:" not in body and "flowmask serve" not in body


def test_a_request_that_names_a_file_of_this_machine_gets_nothing_of_it(site: Served, lab: Path) -> None:
    """Requests of a client that does not use the page."""
    status, body = request(site, "GET", "/config")
    assert status == 200
    events = [one["id"] for one in json.loads(body)["dependencies"]]
    before = set(site.files())
    for event in events:
        for path in (str(lab / "film9.mp4"), "/etc/passwd", "http://192.0.2.1/clip.mp4"):
            data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "the dog"]
            name = f"stranger{event}"
            asked = json.dumps({"data": data, "fn_index": event, "session_hash": name})
            request(site, "POST", "/gradio_api/queue/join", asked, **{"Content-Type": "application/json"})
            _, answers = request(site, "GET", f"/gradio_api/queue/data?session_hash={name}")
            assert "Done" not in answers and "64x48" not in answers and "root:" not in answers
    assert set(site.files()) <= before


def test_an_upload_must_say_a_size_that_is_taken(site: Served) -> None:
    for length, statuses in (("99999999", [413]), ("-1", [400, 413]), ("x", [400, 413])):
        status, line = request(site, "POST", "/gradio_api/upload", "", **{"Content-Length": length})
        assert status in statuses and "\n" not in line
