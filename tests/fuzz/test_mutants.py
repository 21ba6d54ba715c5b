"""Damaged files give their maker's values or one line: never a trace, a hang or unlimited memory.

300 mutants in all, 10,000 in the long form. TRIALS=n tries n times as many; SEED chooses others. KEEP=DIR keeps
the files of failures.
"""

import json
import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import bounded
from seals import rewrite
from stored_files import FILES, Readable
from trials import SEED, TRIALS

from flowmask.launch.slurm import commands
from flowmask.launch.slurm.submission import Attempt, Submission, Verdict
from flowmask.models.errors import UserError
from flowmask.models.process import process_here
from flowmask.trainer.predict.export import export
from flowmask.trainer.state.owner import End, Start
from flowmask.trainer.track import spool

OLDER = Path(__file__).parents[1] / "golden" / "older"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One of each file: a cache and a run of the oldest version with today's seals, exports, a submission, datasets."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(OLDER, folder, symlinks=True, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(commands, "_run", lambda command: (_ for _ in ()).throw(commands.ConfigError("no SLURM here")))
        rewrite(folder / "cache/manifest.json", lambda manifest: manifest.update(schema_version=2))
        (state,) = folder.glob("run/checkpoints/step_*/state.json")
        rewrite(state, lambda document: document.update(format=2))
        (folder / "cache/quarantine.jsonl").write_text('{"video":"a","clip":null,"file":"b","reason":"c"}\n' * 3)
        shutil.copytree(folder / "cache", folder / "unfinished")
        (folder / "unfinished/manifest.json").unlink()
        for name, kind in (("export", "diffusers"), ("export.safetensors", "safetensors"), ("export.pth", "flowrvs")):
            export("run", format=kind, out=folder / name, wan=folder / "wan")
        track(folder / "run")
        submit(folder)
        stages = [{"name": name, "out": str(folder / name)} for name in ("run", "evaluation")]
        (folder / "curriculum").mkdir()
        (folder / "curriculum/curriculum.json").write_text(json.dumps({"config": "c.yaml", "stages": stages}))
        refs = [{"ref_id": i, "sentences": [{"raw": f"the thing {i}"}], "split": "val"} for i in range(20)]
        (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
        masks = {str(i): [{"size": [4, 4], "counts": "0a"}, None] for i in range(20)}
        (folder / "mask_dict.json").write_text(json.dumps(masks))
        yield folder


def track(run: Path) -> None:
    """Write the files of a run for MLflow, and the rows of its evaluations."""
    rows = ({"step": step, "loss": 0.5, "jf": 80.0, "definition": "0" * 12} for step in (1, 2, 3))
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = spool.TrackingPlan(key="k" * 32, uri="http://a:1", experiment="e", name="n", folder=str(run))
    spool.write_plan(run, plan)
    spool.write_sent(run, spool.Sent(uri=plan.uri, run_id="0" * 32, outbox_bytes=10))
    spool.add_metrics(run, 1, {"eval/loss": 0.5})
    spool.add_artifact(run, run / "config.yaml", to="config")


def submit(folder: Path) -> None:
    """Write a submission of the run, in a separate folder."""
    out = folder / "submitted"
    shutil.copytree(folder / "run", out, symlinks=True)
    submission = Submission.create(out, kind="train", resolved={"out": "submitted", "launch": {}})
    submission.set_slurm(job_id="17", array=1)
    submission.add_attempt(Attempt(0, "preempted", "SLURM took the nodes back"), array=0)
    submission.set_verdict(Verdict(1, "crashed", "rank 0 failed"), array=0)
    here = process_here(os.getpid())
    for name, value in ((".owner.json", Start(here, here, 1)), (".ended.json", End(1, 1, "rank 0 failed"))):
        from pydantic import TypeAdapter

        (out / name).write_bytes(TypeAdapter(type(value)).dump_json(value))


def outcome(entry: Readable, lab: Path, *, size: int, made: Any) -> str:
    """The result of reading; AssertionError if the error is not one line."""
    try:
        with bounded(size):
            found = entry.read(lab)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, f"no line: {str(error)[:300]!r}"
        return "refused"
    return "same" if repr(found) == repr(made) else "other"


@pytest.mark.parametrize("each", [10, pytest.param(330, marks=pytest.mark.long)], ids=["short", "long"])
@pytest.mark.parametrize("entry", FILES, ids=lambda entry: f"{entry.file}-{getattr(entry.read, '__name__', 'read')}")
def test_a_damaged_file_gives_what_its_maker_made_or_one_line(
    lab: Path, entry: Readable, each: int, record_property: Any
) -> None:
    path, rng = lab / entry.file, random.Random(f"{SEED} {entry.file}")
    content, made, told = path.read_bytes(), entry.read(lab), Counter[str]()
    assert outcome(entry, lab, size=len(content), made=made) == "same", "a good file is read"
    problems = []
    try:
        for trial in range(each * TRIALS):
            change = rng.choice(entry.changes)
            changed = change(content, rng)
            path.write_bytes(changed)
            try:
                result = outcome(entry, lab, size=len(changed), made=made)
                told[result] += 1
                if entry.faithful and change.__name__ != "resealed":
                    assert result != "other", "another result, without a word"
            except Exception as error:  # noqa: BLE001 - all of them are what is looked for
                problems.append(f"{trial} {change.__name__}: {type(error).__name__}: {str(error)[:300]}")
                keep = os.environ.get("KEEP")
                if keep:
                    Path(keep, f"{path.name}.{trial}").write_bytes(changed)
    finally:
        path.write_bytes(content)
    record_property("mutants", json.dumps(told))
    print(entry.file, dict(told))
    assert not problems, "\n".join(problems)


def pipe(path: Path) -> None:
    os.mkfifo(path)


SPECIAL = {
    "a pipe": pipe,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("gone"),
    "nothing in it": Path.touch,
}


@pytest.mark.parametrize("special", SPECIAL)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(lab: Path, special: str) -> None:
    problems = []
    for entry in FILES:
        path, made = lab / entry.file, entry.read(lab)
        content = path.read_bytes()
        path.unlink()
        SPECIAL[special](path)
        try:
            result = outcome(replace(entry), lab, size=len(content), made=made)
            missing = special == "a link to nothing"  # like a missing file, which is right for some files
            assert result != "other" or missing or not entry.faithful, "another result, without a word"
        except Exception as error:  # noqa: BLE001
            problems.append(f"{entry.file}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            path.write_bytes(content)
    assert not problems, "\n".join(problems)


LINKED = ("cache/manifest.json", "cache/index.npy", "cache/shards/000000.tar", "run/checkpoints/")
FOLLOWED = [entry for entry in FILES if entry.file.startswith(LINKED)]


@pytest.mark.parametrize("entry", FOLLOWED, ids=lambda entry: f"{entry.file}-{entry.read.__name__}")
def test_a_link_out_of_a_cache_or_a_checkpoint_is_not_followed(lab: Path, tmp_path: Path, entry: Readable) -> None:
    path = lab / entry.file
    outside = shutil.move(path, tmp_path / path.name)
    path.symlink_to(outside)
    try:
        with pytest.raises(UserError, match="outside of"):
            entry.read(lab)
    finally:
        path.unlink()
        shutil.move(outside, path)
