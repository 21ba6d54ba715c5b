"""A secret from any source is in no file except the batch script, and is never shown."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import make_lab, run_config

from flowmask.launch import dispatch, jobs
from flowmask.launch.cli import main as cli
from flowmask.launch.config import load_job
from flowmask.launch.jobs import TrainJob
from flowmask.models.errors import ConfigError
from flowmask.models.safe.secrets import URI_VARIABLE

MARK = "Mark3rMark3r"
INNOCENT = {  # secrets in variables whose names do not show it
    "SETTINGS_JSON": json.dumps({"db": {"password": MARK}}),
    "NOTIFY": f"https://hooks.example/services/T0/{MARK}",
    "STORAGE": f"DefaultEndpoint=x;AccountKey={MARK}",
    "DOWNLOAD": f"https://h/x?sig={MARK}",
    "HF_TOKEN": f"hf_{MARK}",
    "MLFLOW_TRACKING_PASSWORD": MARK,
    "MLFLOW_TRACKING_TOKEN": MARK,
    "SLURM_COMMENT": MARK,
}
LAUNCH = {
    "setup": [f"export HF_TOKEN={MARK}", f"A='{MARK} x' B=${{oc.env:PLANTED}}", f"login --token {MARK}"],
    "srun_args": [f"--export=ALL,T={MARK}", "--container-env=${oc.env:PLANTED}"],
    "sbatch_args": {"comment": "${oc.env:PLANTED}", "export": f"ALL,T={MARK}"},
}


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {**INNOCENT, "PLANTED": MARK, "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}.items():
        monkeypatch.setenv(name, value)
    yield
    os.environ.pop(URI_VARIABLE, None)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    make_lab(folder)
    return folder


def config(lab: Path, out: Path, uri: str, **launch: Any) -> Path:
    """A training's YAML with secrets in every place that can hold one."""
    tree = run_config(lab, out, {"train.steps": 2}).model_dump(mode="json")
    tree["tracking"] = {"enabled": True, "uri": uri, "end_timeout_s": 120}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree | {"launch": LAUNCH | launch}))
    return path


def holders(folder: Path) -> list[Path]:
    """Every file that contains the secret."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(path.relative_to(folder) for path in files if MARK.encode() in path.read_bytes())


@pytest.mark.parametrize(
    "uri",
    [
        f"http://u:{MARK}@127.0.0.1:1/?token={MARK}",
        "http://u:${oc.env:PLANTED}@127.0.0.1:1",
        "sqlite:///${oc.env:PLACE}/my.db",
    ],
)
def test_a_run_leaves_no_secret_in_its_folder_its_database_and_its_log(
    uri: str, lab: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path))
    out = tmp_path / "runs" / "a"
    out.parent.mkdir()
    path = config(lab, out, uri, cluster="debug")
    settings = ["tracking.end_timeout_s=1"] if "127.0.0.1" in uri else []
    assert dispatch.start("train", path, settings) == 0
    path.unlink()
    said = "".join(capfd.readouterr())
    assert MARK not in said and not holders(tmp_path)
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["tracking"]["uri"] == uri.replace(f"u:{MARK}@", "***@").replace(f"={MARK}", "=***")
    assert saved["launch"]["setup"] == ["export HF_TOKEN=***", "A=*** B=${oc.env:PLANTED}", "login --token ***"]
    assert saved["launch"]["sbatch_args"] == {"comment": "${oc.env:PLANTED}", "export": "ALL,T=***"}
    assert (out / "tracking.json").stat().st_mode & 0o777 == 0o600
    os.environ.pop(URI_VARIABLE, None)
    again = ["train.steps=3", "launch.cluster=debug", *settings]
    if "***" in saved["tracking"]["uri"]:
        with pytest.raises(ConfigError, match=r"give tracking\.uri again"):
            dispatch.start("train", out / "config.yaml", again)
        again.append(f"tracking.uri={uri}")
    assert dispatch.start("train", out / "config.yaml", again) == 0
    assert MARK not in "".join(capfd.readouterr()) and not holders(tmp_path)
    if "sqlite" in uri:
        assert (tmp_path / "my.db").is_file()


SBATCH = """#!/bin/sh
[ "$1" = --test-only ] && exit 0
echo "Submitted batch job 7"
"""
SCONTROL = "#!/bin/sh\nexit 1\n"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setattr(dispatch.preflight, "examine", lambda *_: [])


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("array", [1, 2])
def test_of_a_submitted_job_the_batch_script_alone_holds_secrets_and_is_its_owners(
    array: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "a"
    out.parent.mkdir()
    asked = {"cluster": "slurm", "gpus_per_node": 0, "cpus_per_node": 1, "array": array}
    if array == 1:
        path = config(tmp_path / "lab", out, f"http://u:{MARK}@127.0.0.1:1", **asked)
        kind = "train"
    else:
        path, kind = out.with_suffix(".yaml"), "cache"
        tree = {"out": str(out), "model": {"wan": "w"}, "data": {"root": "d"}, "launch": LAUNCH | asked}
        path.write_text(yaml.safe_dump(tree))
    assert dispatch.start(kind, path, wait=False) == 0
    path.unlink()
    (script,) = holders(tmp_path)
    assert script.suffix == ".sh" and (tmp_path / script).stat().st_mode & 0o777 == 0o600
    text = (tmp_path / script).read_text()
    assert text.count(MARK) == 8 + (array == 1) and "oc.env" not in text and "***" not in text
    assert MARK not in "".join(capfd.readouterr())
    for name in ("environment.json", "changes.patch"):
        assert (out / "launch" / "0001" / name).stat().st_mode & 0o777 == 0o600
    known = json.loads((out / "launch" / "0001" / "environment.json").read_text())
    assert known["PATH"] == os.environ["PATH"] and not set(known) & set(INNOCENT)
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(json.loads((out / "launch" / "0001" / "job.json").read_text())["config"]))
    with pytest.raises(ConfigError, match=r"(launch\.setup|tracking\.uri) .*from a saved copy") as refused:
        dispatch.start(kind, copy, wait=False)
    assert "\n" not in str(refused.value) and MARK not in str(refused.value)


@pytest.mark.usefixtures("slurm")
def test_a_dry_run_and_doctor_show_no_secret(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(
        tmp_path / "lab",
        tmp_path / "a",
        f"http://u:{MARK}@127.0.0.1:1/?token={MARK}",
        cluster="slurm",
        gpus_per_node=0,
        cpus_per_node=1,
    )
    assert dispatch.submit(path, [], wait=False, dry_run=True) == 0
    said = capfd.readouterr()
    assert "export HF_TOKEN=***" in said.out and MARK not in said.out + said.err
    from flowmask.launch.check import questions

    for uri in ("tracking.uri=http://u:${oc.env:PLANTED}@127.0.0.1:1/?t=${oc.env:PLANTED}", "train.steps=2"):
        (found,) = questions.mlflow_server(questions.subject_of(path, [uri]))
        assert found.state == "warn" and MARK not in str(found) and "127.0.0.1:1" in found.said


@pytest.mark.parametrize(
    "key", ["out", "launch.partition", "launch.setup.0", "launch.sbatch_args.comment", "data.cache"]
)
@pytest.mark.parametrize("bad", ["\n", "\r", "\x1b", "\u2028", "\x00", "\x9b", "\x85"])
def test_no_value_of_a_config_ends_a_line(key: str, bad: str, tmp_path: Path) -> None:
    path = config(tmp_path / "lab", tmp_path / "a", "http://h", cluster="slurm")
    tree = yaml.safe_load(path.read_text())
    *sections, last = key.split(".")
    section = tree
    for name in sections:
        section = section[name]
    section[int(last) if last.isdecimal() else last] = f"gpu{bad}touch X"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as refused:
        load_job(path, TrainJob)
    assert key in str(refused.value) and str(refused.value).isprintable()
    with pytest.raises(ConfigError):
        jobs.load_any(path)


@pytest.mark.parametrize("name", ["a b", "a\nb", "--x=y", "wrap\n#SBATCH", "x;y", ""])
def test_no_name_of_an_option_of_sbatch_is_anything_else(name: str, tmp_path: Path) -> None:
    path = config(tmp_path / "lab", tmp_path / "a", "http://h", cluster="slurm", sbatch_args={name: "x"})
    if name == "--x=y":
        assert "=" in name
    with pytest.raises(ConfigError):
        load_job(path, TrainJob)


def test_every_line_of_a_script_that_sbatch_reads_is_one_option(tmp_path: Path) -> None:
    from flowmask.launch.slurm import executor, resources

    strange = "g; touch X $(touch X) `touch X` '\" #SBATCH --wrap=x \\"
    path = config(tmp_path / "lab", tmp_path / f"a {strange}".replace("/", ""), "http://h", cluster="slurm")
    keys = dict.fromkeys(("partition", "account", "qos", "constraint"), strange)
    job = load_job(path, TrainJob, ["launch.gpus_per_node=0", "launch.cpus_per_node=1"])
    launch = job.launch.model_copy(update={**keys, "sbatch_args": {"comment": strange}})
    job = job.model_copy(update={"launch": launch})
    script = executor.script(job.out, resources.settle(job).launch, name=strange).splitlines()
    first = script.index("# setup")
    assert all(line.startswith("#SBATCH --") for line in script[3 : first - 1])
    assert not any(line.startswith("#SBATCH") for line in script[first:])
    options = [line.split("=")[0] for line in script[3 : first - 1]]
    assert len(options) == len(set(options)) > 10


def test_the_command_fails_in_one_line_with_what_a_secret_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tmp_path / "lab", tmp_path / "a", "http://u:${oc.env:NOT_SET}@h", cluster="debug")
    monkeypatch.setattr("sys.argv", ["flowmask", "train", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(said) == 1 and "NOT_SET" in said[0]
