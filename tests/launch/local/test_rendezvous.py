"""Ranks always find each other, on the one interface that they need, and end with 0 when their work is done."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bare_ranks
import pytest
from command import Started, environment, flowmask
from runs import run_config
from trials import TRIALS

from flowmask.launch.local.processes import Group
from flowmask.launch.slurm import task
from flowmask.models.errors import ConfigError, TrainingError
from flowmask.trainer import distributed


def launched(*words: object) -> Started:
    variables = {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # as in a group of the test's caller
        variables[name] = "7"
    return Started([str(word) for word in words], main=bare_ranks.launch, variables=variables)


def found(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank_*.json"))]


def launch_together(folder: Path, *, launches: int, at_once: int = 3) -> None:
    """`launches` launches of two ranks, `at_once` at the same time; none may fail."""
    outs = [folder / str(number) for number in range(at_once)]
    for out in outs:
        out.mkdir()
    runs = [launched(out, launches // at_once + (number < launches % at_once)) for number, out in enumerate(outs)]
    said = [run.communicate(timeout=3000)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * at_once, said
    for out in outs:
        assert found(out) == [{"total": 3, "world": 2, "listens": ["127.0.0.1"]}] * 2


def test_launches_at_once_on_one_machine_all_meet_and_end(tmp_path: Path) -> None:
    launch_together(tmp_path, launches=3)


@pytest.mark.long
def test_many_launches_three_at_a_time_all_meet_and_end(tmp_path: Path) -> None:
    launch_together(tmp_path, launches=TRIALS * 60)


@pytest.mark.long
def test_trainings_three_at_a_time_all_end_with_zero(lab: Path, tmp_path: Path) -> None:
    trainings = TRIALS * 6
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_config(lab, tmp_path / "run", {"train.steps": 3}).model_dump(mode="json")))
    waiting, running = list(range(trainings)), list[subprocess.Popen[bytes]]()
    while waiting or running:
        while waiting and len(running) < 3:
            words = ("train", config, "launch.processes_per_node=2", f"out={tmp_path / f'run_{waiting.pop()}'}")
            command = [sys.executable, "-m", "flowmask", *map(str, words)]
            running.append(subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL))
        for run in [run for run in running if run.poll() is not None]:
            assert run.returncode == 0
            running.remove(run)
        time.sleep(0.1)
    assert len(list(tmp_path.glob("run_*/checkpoints/step_00000003"))) == trainings


def test_nodes_meet_at_a_socket_that_listened_first_and_only_on_its_address(tmp_path: Path) -> None:
    runs = [launched(tmp_path, 1, first_rank, tmp_path) for first_rank in (0, 2)]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert found(tmp_path) == [{"total": 10, "world": 4, "listens": ["127.0.0.1"]}] * 4


def test_a_node_that_can_not_listen_on_the_address_it_is_known_by_says_so_in_one_line() -> None:
    with pytest.raises(TrainingError, match=r"^SLURM_LAUNCH_NODE_IPADDR is 192\.0\.2\.1, but [^\n]*$"):
        task._listen("192.0.2.1")


@pytest.mark.parametrize(
    ("variable", "value", "fine"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", True),
        ("GLOO_SOCKET_IFNAME", "", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "lo,ib7", False),
        ("NCCL_SOCKET_IFNAME", "l", True),
        ("NCCL_SOCKET_IFNAME", "ib7,lo", True),
        ("NCCL_SOCKET_IFNAME", "=lo", True),
        ("NCCL_SOCKET_IFNAME", "^docker,veth", True),
        ("NCCL_SOCKET_IFNAME", "=l", False),
        ("NCCL_SOCKET_IFNAME", "ib7", False),
    ],
)
def test_an_interface_that_is_not_there_is_one_line(
    variable: str, value: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(variable, value)
    if fine:
        distributed._choose_interfaces("", nccl=True)
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo", "one machine talks to nobody else"
        return
    with pytest.raises(ConfigError, match=f"^{variable} is {value}; .* has no such network interface"):
        distributed._choose_interfaces("", nccl=True)


def test_a_listener_is_let_go_by_the_launcher_when_rank_zero_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowmask.launch.local import processes

    listener = task._listen("127.0.0.1")
    monkeypatch.setattr(processes, "python_module", lambda *_: [sys.executable, "-c", ""])
    assert processes.run_local("train", {}, processes=1, group=Group(0, 2, "127.0.0.1:1", listener)) == 0
    assert listener.fileno() == -1


def test_debug_and_one_process_commands_do_not_obey_a_foreign_group(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "9", "LOCAL_RANK": "3"}
    foreign |= {"TORCHELASTIC_RUN_ID": "x", "PMI_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_config(lab, tmp_path / "run", {"train.steps": 1}).model_dump(mode="json")))
    done = flowmask("train", config, "launch.cluster=debug", timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert "1 process x micro-batch" in done.stderr
