"""The output before a job is sent: its kind, the refusals, the exact script."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_slurm import fake_slurm

from flowmask.launch.cli import main as cli

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "submit"
TRAIN: dict[str, Any] = {
    "out": "runs/a",
    "model": {"wan": "weights/wan"},
    "data": {"cache": "caches/a"},
    "train": {"steps": 10, "global_batch": 32, "micro_batch": 2},
    "launch": {
        "cluster": "slurm",
        "nodes": 2,
        "processes_per_node": 4,
        "gpus_per_node": 4,
        "cpus_per_node": 32,
        "mem_gb": 200,
        "time_min": 720,
        "partition": "gpu",
        "account": "lab",
        "qos": "long",
        "constraint": "a100",
        "setup": ["module load cuda"],
        "srun_args": ["--container-image=image.sqsh"],
        "sbatch_args": {"exclude": "bad[1-2]"},
        "signal_margin_s": 180,
    },
}
CACHE: dict[str, Any] = {
    "out": "caches/a",
    "model": {"wan": "weights/wan"},
    "data": {"root": "datasets/a"},
    "launch": {"cluster": "slurm", "array": 8, "array_parallel": 3, "processes_per_node": 2},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on a machine without SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    return tmp_path


def said(*words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["flowmask", *words])
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    found = capsys.readouterr()
    return code, found.out, found.err


@pytest.mark.parametrize(("name", "config"), [("train", TRAIN), ("cache", CACHE)])
def test_a_dry_run_prints_the_script_as_it_has_always_been(
    name: str,
    config: dict[str, Any],
    place: Path,
    capsys: Any,
    monkeypatch: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The training config states its needs of a node; those of the cache are derived."""
    fake_slurm(tmp_path_factory.mktemp("slurm"), monkeypatch, {"gpu": [("gpu:a100:8(S:0-1)", 64)]})
    Path("job.yaml").write_text(yaml.safe_dump(config))
    code, out, _ = said("submit", "job.yaml", "--dry-run", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    script = out.partition("\n# " + name)[0].replace(str(place.resolve()), "PLACE").replace(sys.executable, "PYTHON")
    assert script.strip() == (GOLDEN / f"{name}.sh").read_text().strip()
    assert [path.name for path in place.iterdir()] == ["job.yaml"]


def test_a_dry_run_says_the_plan_what_would_be_refused_and_what_it_could_not_check(
    place: Path, capsys: Any, monkeypatch: Any
) -> None:
    Path("job.yaml").write_text(yaml.safe_dump(TRAIN))
    _, out, _ = said("submit", "job.yaml", "--dry-run", capsys=capsys, monkeypatch=monkeypatch)
    plan = out.partition("\n# train")[2]
    assert "8 processes x micro-batch 2 x 2 = global batch 32" in plan
    refused, _, unknown = plan.partition("submit would refuse:")[2].partition("could not be checked here:")
    assert "weights/wan" in refused and "caches/a/manifest.json" in refused
    assert "no sbatch on this machine" in unknown


def test_a_dry_run_says_what_is_asked_of_a_node_and_warns_once_where_that_is_not_known(
    place: Path, capsys: Any, monkeypatch: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    Path("job.yaml").write_text(yaml.safe_dump(CACHE))
    words = ("submit", "job.yaml", "--dry-run")
    code, out, _ = said(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and out.count("warning: launch.gpus_per_node") == 1
    assert "--gpus" not in out and "# each node: GPUs unknown, 10 CPUs" in out
    _, out, _ = said(*words, "launch.gpus_per_node=0", capsys=capsys, monkeypatch=monkeypatch)
    assert "launch.gpus_per_node" not in out and "--gpus" not in out
    fake_slurm(tmp_path_factory.mktemp("slurm"), monkeypatch, {"gpu": [("gpu:8", 64)]})
    _, out, _ = said(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert "# each node: 2 GPUs (one per process), 10 CPUs (2 processes x (1 + 4 reading threads))" in out
    assert "warning" not in out


def test_submitting_where_there_is_no_slurm_is_one_line(place: Path, capsys: Any, monkeypatch: Any) -> None:
    Path("job.yaml").write_text(yaml.safe_dump(TRAIN))
    code, _, err = said("submit", "job.yaml", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert "no sbatch" in err.splitlines()[-1] and "Traceback" not in err
    assert [path.name for path in place.iterdir()] == ["job.yaml"]


def test_the_same_config_is_refused_for_this_machine_before_any_process_starts(
    place: Path, capsys: Any, monkeypatch: Any
) -> None:
    Path("job.yaml").write_text(yaml.safe_dump(TRAIN))
    code, _, err = said("submit", "job.yaml", "launch.cluster=debug", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert "weights/wan does not exist" in err.splitlines()[-1]
