"""The imports of a command and of a rank before their first line; a new heavy package must be added to a table here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowmask.launch.jobs import KINDS, UNUSED
from flowmask.launch.local import processes

# Small packages that every command needs: together a quarter of a second of CPU time.
LIGHT = {
    *("flowmask", "typer", "click", "shellingham", "rich", "pygments", "markdown_it", "mdurl", "attr", "pydantic"),
    *("pydantic_core", "annotated_types", "annotated_doc", "typing_extensions", "typing_inspection", "omegaconf"),
    *("antlr4", "yaml", "psutil", "cython_runtime"),
}
LISTED = f"""
import sys
def packages():
    names = {{name.split(".")[0] for name in sys.modules if not name.startswith("_")}}
    return sorted(name for name in names - sys.stdlib_module_names - {LIGHT!r} if "_finder" not in name)
"""
RUN = """
import contextlib, io, json
from flowmask.launch.cli.main import main
def run(words):
    sys.argv = ["flowmask", *words]
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main()
    return said.getvalue()
"""
NONE = ["nothing"]  # a file that does not exist
# Allowed packages -> commands that import no others, each up to an error or a complete answer.
COMMANDS: dict[tuple[str, ...], list[list[str]]] = {
    (): [
        *([*words, "--help"] for words in ([], ["plan"], ["compare"], ["serve"], ["predict"], ["cache", "build"])),
        *([name, *NONE] for name in ("train", "evaluate", "curriculum", "status", "logs", "stop", "tune")),
        *(["cache", name, *NONE] for name in ("build", "status")),
        ["configs"],
        ["demo", "--smoke", "--full"],
        ["evaluate", *NONE, "--try-settings"],
        ["predict", *NONE, "the dog", "--checkpoint", "nothing"],
        ["submit", "cache_mevis", "cache.clips=5", "--dry-run"],
    ],
    ("numpy",): [
        ["profile", *NONE],
        ["submit", "train_mevis", "train.sleep=1", "--dry-run"],
        ["train", "train_mask_decoder", "a.b=1"],
    ],
    ("PIL", "numpy"): [
        ["reproduce", *NONE],
        ["compare", "nothing", "nowhere"],
        ["report", *NONE],
        ["submit", "evaluate_a2d", "box=1", "--dry-run"],
    ],
}
MODULES = {(): ["flowmask.launch.dispatch", "flowmask.launch.check.doctor"]}  # the start of a job and of `doctor`
# Commands that compute, with their arguments: each prints a line before it imports torch.
TOLD = [
    ["plan", "train_mevis"],
    ["tune", "train_mevis"],
    ["submit", "train_mevis", "--dry-run"],
    ["curriculum", "curriculum_mevis_v2", "--dry-run"],
    ["evaluate", "evaluate_mevis", "--try-settings"],
    ["predict", ".", "the dog", "--checkpoint", "."],
    ["export", "nothing"],
    ["import", "wan", "nothing", "nowhere"],
    ["import", "flowrvs", "nowhere", "--dit", "nothing"],
    ["cache", "verify", *NONE],
    ["cache", "repair", *NONE],
    ["cache", "inspect", *NONE, "--out", "page.html"],
    ["tiny-wan", "folder"],
    ["toy", "folder"],
]
LATER = {"tune", "submit", "curriculum", "verify"}  # need diffusers in their ranks, or not always
# For each kind of job: imports before, the module of its rank, and the packages that the module adds.
WAN = "diffusers.models.transformers.transformer_wan"
RANKS = {
    "train": (f"torch, {WAN}", "flowmask.trainer.run.train", set()),
    "evaluate": (f"torch, {WAN}", "flowmask.trainer.score.evaluate", set()),
    "cache": ("torch", "flowmask.data_pipeline.build.build", {"PIL", "numpy", "safetensors", "tqdm"}),
}


def ask(code: str, *, folder: Path) -> object:
    """The last line that Python code prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(done.stdout.splitlines()[-1])


def at_import(package: str, fact: str, commands: list[list[str]], *, folder: Path) -> dict[str, list[object]]:
    """What the Python expression `fact` gives as each command imports the package, and the command ends.

    Returns a list of one value for each command, empty if it does not import the package.
    """
    code = f"""{LISTED}{RUN}
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            facts.append({fact})
            raise SystemExit
sys.meta_path.insert(0, Stop())
found = {{}}
for words in {commands!r}:
    facts = []
    run(words)
    found[" ".join(words)] = facts[:1]
print(json.dumps(found))"""
    found = ask(code, folder=folder)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("allowed", COMMANDS, ids=lambda allowed: "+".join(allowed) or "nothing heavy")
def test_a_command_that_computes_nothing_imports_nothing_heavy(allowed: tuple[str, ...], tmp_path: Path) -> None:
    """`flowmask --help`, a question about a run, and a mistake in a config do not wait for torch."""
    code = f"{LISTED}{RUN}\nfound = {{}}\n"
    code += f"for words in {COMMANDS[allowed]!r}:\n    run(words)\n    found[' '.join(words)] = packages()\n"
    code += f"for name in {MODULES.get(allowed, [])!r}:\n    __import__(name)\n    found[name] = packages()\n"
    found = ask(f"{code}print(json.dumps(found))", folder=tmp_path)
    assert isinstance(found, dict)
    assert not {name: more for name, used in found.items() if (more := set(used) - set(allowed))}


def test_a_package_that_a_command_gains_is_found(tmp_path: Path) -> None:
    planted = "clean = main\ndef main():\n    import numpy\n    clean()\n"
    code = f"{LISTED}{RUN}{planted}run(['--help'])\nprint(json.dumps(packages()))"
    assert ask(code, folder=tmp_path) == ["numpy"]


def test_a_command_says_a_line_before_it_imports_torch(tmp_path: Path) -> None:
    said = at_import("torch", "sys.stderr.getvalue()", TOLD, folder=tmp_path)
    assert not {words: lines for words, lines in said.items() if lines in ([], [""])}


def test_a_command_that_needs_wan_imports_diffusers_without_what_it_does_not_use(tmp_path: Path) -> None:
    commands = [words for words in TOLD if not LATER & {*words}]
    hidden = f"[sys.modules.get(package, 'there') for package in {UNUSED!r}]"
    found = at_import("diffusers", hidden, commands, folder=tmp_path)
    assert found == {" ".join(words): [[None] * len(UNUSED)] for words in commands}


def test_a_job_says_that_it_starts_before_its_ranks_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_start", lambda *args, **more: sys.exit(7))
    with pytest.raises(SystemExit):
        processes.run_local("train", {}, processes=2)
    captured = capsys.readouterr()
    assert "train: starting 2 processes" in captured.err and not captured.out


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_imports_few_packages_beyond_those_that_it_stands_on(kind: str, tmp_path: Path) -> None:
    """DeepSpeed comes later, with the engine. diffusers' Wan imports transformers, peft, scipy and others."""
    ground, module, allowed = RANKS[kind]
    code = f"{LISTED}\nimport json, {ground}\nbefore = set(packages())\n"
    code += f"import flowmask.launch.local.worker, {module}\nprint(json.dumps(sorted(set(packages()) - before)))"
    added = ask(code, folder=tmp_path)
    assert isinstance(added, list)
    assert set(added) <= allowed


@pytest.mark.parametrize("config", ["train_mevis", "train_mevis_lora", "evaluate_mevis", "cache_mevis"])
def test_a_rank_leaves_out_what_no_job_uses_of_diffusers_and_finds_it_later(config: str, tmp_path: Path) -> None:
    code = f"""{LISTED}
import json
from importlib import import_module
from pathlib import Path
from flowmask.launch import jobs
job, _ = jobs.load_any(Path({config!r}), ["launch.gpus_per_node=0"])
def work(self, resolved, *, rank, world):
    import flowmask.trainer.run.train, flowmask.trainer.score.evaluate
    import diffusers.models.autoencoders.autoencoder_kl_wan, {WAN}
    found.append(packages())
type(job).work, found = work, []
jobs.run_rank(job.KIND, job.model_dump(mode="json"), own_process=True)
for name in {UNUSED if "lora" in config else ()}:
    import_module(name)
print(json.dumps(found))"""
    (found,) = ask(code, folder=tmp_path)  # type: ignore[misc]
    assert "diffusers" in found and not set(UNUSED) & set(found)
