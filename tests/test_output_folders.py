"""The law of results, for every command that writes any: no file of others is lost, and no end leaves half results."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from disturbed import (
    FINISHED,
    KILLED,
    REFUSED,
    calls_of,
    contents,
    end_of,
    every_call,
    full_from,
    in_child,
    kill_at,
    takes_space,
    with_file_limit,
)
from trials import SEED, TRIALS
from writers import NAMES, Writer, writers

from flowmask.launch.local.worker import explain_disk_error
from flowmask.models.errors import UserError

ONCE = ("export file", "export folder", "import", "import wan", "tiny-wan")  # these refuse any existing target


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Writer]:
    return writers(tmp_path_factory.mktemp("lab"))


def command(writer: Writer, out: Path) -> None:
    """Run a writer as the command line does: an error of the disk is one line."""
    try:
        writer(out)
    except Exception as error:
        said = None if isinstance(error, UserError) else explain_disk_error(error)
        if said is None:
            raise
        raise UserError(said) from error


@pytest.fixture
def undisturbed(commands: dict[str, Writer], tmp_path: Path) -> Callable[[str], dict[str, bytes | str]]:
    def make(name: str) -> dict[str, bytes | str]:
        command(commands[name], tmp_path / "undisturbed")
        return contents(tmp_path / "undisturbed")

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_somebody_elses_in_any_place_that_is_written_stays(
    commands: dict[str, Writer], undisturbed: Callable[[str], dict[str, bytes | str]], name: str, tmp_path: Path
) -> None:
    files = [*undisturbed(name), ".lock", ".owner.json"]
    folders = {str(parent) for file in files for parent in Path(file).parents} - {"."}
    places = [*files, *folders, *(f"{folder}/mine" for folder in folders), "notes.txt"]
    for number, place in enumerate(places):
        out = tmp_path / str(number)
        (out / place).parent.mkdir(parents=True)
        (out / place).write_text("mine")
        try:
            command(commands[name], out)
        except UserError as refusal:
            assert "\n" not in str(refusal)
        assert (out / place).read_text() == "mine", place


@pytest.mark.parametrize("name", NAMES)
def test_what_somebody_else_adds_to_our_results_stays(
    commands: dict[str, Writer], undisturbed: Callable[[str], dict[str, bytes | str]], name: str, tmp_path: Path
) -> None:
    for number, folder in enumerate({str(Path(file).parent) for file in undisturbed(name)}):
        out = tmp_path / str(number)
        command(commands[name], out)
        (out / folder / "mine").write_text("mine")
        try:
            command(commands[name], out)
        except UserError as refusal:
            assert "\n" not in str(refusal)
        assert (out / folder / "mine").read_text() == "mine", folder


def drawn(numbers: Sequence[int], most: int, *, seed: str) -> list[int]:
    return sorted(random.Random(f"{SEED} {seed}").sample(numbers, min(most, len(numbers))))


def check_kills(writer: Writer, name: str, *, wanted: dict[str, bytes | str], folder: Path, draws: int) -> None:
    total = calls_of(partial(command, writer, folder / "counted"), counted=every_call)
    for number in drawn(range(1, total + 1), draws, seed=f"kill {name}"):
        out = folder / f"killed_{number}"
        assert kill_at(number, partial(command, writer, out)) == KILLED
        check_again(writer, name, out, wanted=wanted, what=f"killed at {number} of {total}")


def check_full(writer: Writer, name: str, *, wanted: dict[str, bytes | str], folder: Path, draws: int) -> None:
    total = calls_of(partial(command, writer, folder / "counted_space"), counted=takes_space)
    for number in drawn(range(1, total + 1), draws, seed=f"full {name}"):
        out = folder / f"full_{number}"
        assert full_from(number, partial(command, writer, out)) in (FINISHED, REFUSED), f"full from {number}"
        check_again(writer, name, out, wanted=wanted, what=f"full from {number} of {total}")


def check_file_limit(writer: Writer, name: str, *, wanted: dict[str, bytes | str], folder: Path, draws: int) -> None:
    sizes = sorted({len(content) for content in wanted.values() if len(content) > 1 and isinstance(content, bytes)})
    for size in drawn(sizes, max(1, draws // 3), seed=f"limit {name}"):
        out = folder / f"limited_{size}"
        assert with_file_limit(size - 1, partial(command, writer, out)) == REFUSED, f"no file may have {size} bytes"
        check_again(writer, name, out, wanted=wanted, what=f"a limit of {size - 1} bytes")


def check_again(writer: Writer, name: str, out: Path, *, wanted: dict[str, bytes | str], what: str) -> None:
    code = end_of(in_child(partial(command, writer, out)))
    assert code == FINISHED or (code == REFUSED and name in ONCE), f"SEED={SEED}: {what}"
    assert contents(out) == wanted, f"SEED={SEED}: {what}"


@pytest.mark.parametrize("draws", [3, pytest.param(24 * TRIALS, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_was_killed_or_met_a_full_disk_ends_right_when_it_is_given_again(
    commands: dict[str, Writer],
    undisturbed: Callable[[str], dict[str, bytes | str]],
    name: str,
    draws: int,
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {"wanted": undisturbed(name), "folder": tmp_path, "draws": draws}
    for check in (check_kills, check_full, check_file_limit):
        check(commands[name], name, **given)


@pytest.mark.parametrize("name", NAMES)
def test_two_at_once_end_whole_or_one_is_refused(
    commands: dict[str, Writer], undisturbed: Callable[[str], dict[str, bytes | str]], name: str, tmp_path: Path
) -> None:
    wanted, out = undisturbed(name), tmp_path / "both"
    codes = sorted(end_of(child) for child in [in_child(partial(command, commands[name], out)) for _ in range(2)])
    assert codes in ([FINISHED, FINISHED], [FINISHED, REFUSED])
    assert contents(out) == wanted
