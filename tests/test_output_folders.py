"""The law of results, for every command that writes any: no file of others is lost, and no end leaves half results."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
    with_file_limit,
)
from trials import SEED
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


def drawn(total: int, *, seed: str, every: bool) -> list[int]:
    numbers = range(1, total + 1)
    return list(numbers) if every else sorted(random.Random(f"{SEED} {seed}").sample(numbers, 3))


def check_kills(writer: Writer, name: str, *, wanted: dict[str, bytes | str], folder: Path, every: bool) -> None:
    total = calls_of(partial(command, writer, folder / "counted"), counted=every_call)
    for number in drawn(total, seed=f"kill {name}", every=every):
        out = folder / f"killed_{number}"
        assert kill_at(number, partial(command, writer, out)) == KILLED
        code = end_of(in_child(partial(command, writer, out)))
        assert code == FINISHED or (code == REFUSED and name in ONCE), f"SEED={SEED}: killed at {number}"
        assert contents(out) == wanted, f"SEED={SEED}: killed at {number} of {total}"


def check_full(writer: Writer, name: str, *, wanted: dict[str, bytes | str], folder: Path, every: bool) -> None:
    for number in range(1, 10_000) if every else drawn(8, seed=f"full {name}", every=False):
        out = folder / f"full_{number}"
        code = full_from(number, partial(command, writer, out))
        if code == FINISHED and every:
            break
        assert code in (FINISHED, REFUSED), f"SEED={SEED}: full from {number}"
        code = end_of(in_child(partial(command, writer, out)))
        assert code == FINISHED or (code == REFUSED and name in ONCE), f"SEED={SEED}: full from {number}"
        assert contents(out) == wanted, f"SEED={SEED}: full from {number}"


def check_file_limit(writer: Writer, name: str, *, wanted: dict[str, bytes | str], folder: Path, every: bool) -> None:
    sizes = sorted({len(content) for content in wanted.values() if len(content) > 1 and isinstance(content, bytes)})
    for size in sizes if every else random.Random(f"{SEED} limit {name}").sample(sizes, 1):
        out = folder / f"limited_{size}"
        code = with_file_limit(size - 1, partial(command, writer, out))
        assert code == REFUSED, f"no file may have {size} bytes"
        code = end_of(in_child(partial(command, writer, out)))
        assert code == FINISHED or (code == REFUSED and name in ONCE), f"after a limit of {size - 1} bytes"
        assert contents(out) == wanted, f"after a limit of {size - 1} bytes"


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_was_killed_or_met_a_full_disk_ends_right_when_it_is_given_again(
    commands: dict[str, Writer],
    undisturbed: Callable[[str], dict[str, bytes | str]],
    name: str,
    every: bool,
    tmp_path: Path,
) -> None:
    wanted = undisturbed(name)
    check_kills(commands[name], name, wanted=wanted, folder=tmp_path, every=every)
    check_full(commands[name], name, wanted=wanted, folder=tmp_path, every=every)
    check_file_limit(commands[name], name, wanted=wanted, folder=tmp_path, every=every)


@pytest.mark.parametrize("name", NAMES)
def test_two_at_once_end_whole_or_one_is_refused(
    commands: dict[str, Writer], undisturbed: Callable[[str], dict[str, bytes | str]], name: str, tmp_path: Path
) -> None:
    wanted, out = undisturbed(name), tmp_path / "both"
    codes = sorted(end_of(child) for child in [in_child(partial(command, commands[name], out)) for _ in range(2)])
    assert codes in ([FINISHED, FINISHED], [FINISHED, REFUSED])
    assert contents(out) == wanted
