"""The GPU of each kind of job, and the message when it is missing or full.

The machine has no GPU: torch reports 8, every tensor sent to a GPU stays on the CPU, and its target is recorded.
So whole jobs run, through the same entry as any rank.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from command import flowmask
from torch.overrides import TorchFunctionMode

from flowmask.data_pipeline.build.encode import ClipEncoder
from flowmask.data_pipeline.check import verify_masks
from flowmask.data_pipeline.show import inspect_examples
from flowmask.launch import jobs
from flowmask.launch.config import validate
from flowmask.launch.jobs import TrainJob
from flowmask.models.device import gpu_holds, rank_device
from flowmask.models.errors import ConfigError
from flowmask.models.segment import Segmenter
from flowmask.models.text import TextEncoder
from flowmask.trainer.step.engine import Engine

RANK, GPUS = 3, 8
VALID = {"data": {"split": "valid_u"}, "cache": {"leaks": "allow", "clips_per_shard": 2}}


class Node8(TorchFunctionMode):
    """Computes on the CPU all work for a GPU; `used`: the devices that were named."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.default: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {key: self._here(value) for key, value in (kwargs or {}).items() if key != "pin_memory"}
        return func(*(self._here(value) for value in args), **kwargs)

    def _here(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("cuda"):
            value = torch.device(value)
        if isinstance(value, torch.device) and value.type == "cuda":
            self.used.add(str(value))
            return torch.device("cpu")
        return value


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node8]:
    """This process is local rank 3 on a node that shows 8 GPUs."""
    found = Node8()
    alone = torch.distributed.init_process_group
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: GPUS,
        "set_device": lambda device: found.default.append(str(device)),
        "get_device_name": lambda device=None: "NVIDIA A100",
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": None,
        "Event": MagicMock(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **group: alone("gloo", **group))
    monkeypatch.setenv("LOCAL_RANK", str(RANK))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with found:
        yield found


def changed(folder: Path, changes: dict[str, Any], *, out: Path) -> dict[str, Any]:
    """The resolved config of a finished job with other values in its sections."""
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    return config | {"out": str(out)}


def cache_job(smoke: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return changed(smoke / "cache", VALID | changes, out=out)


def train_job(smoke: Path, out: Path, run: str, **changes: Any) -> dict[str, Any]:
    evaluated = {"every_steps": 1, "examples": 2, "jf_examples": 1, "overlays": 1}
    small = {"train": {"steps": 1, "warmup_steps": 0}, "data": {"threads": 0}, "tracking": {"enabled": False}}
    return changed(smoke / "runs" / run, small | {"evaluate": evaluated} | changes, out=out)


@pytest.fixture(scope="module")
def small_cache(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a few units, built on the CPU."""
    out = tmp_path_factory.mktemp("small") / "cache"
    assert jobs.run_rank("cache", cache_job(smoke, out)) == 0
    return out


def build(smoke: Path, out: Path, cache: Path) -> None:
    jobs.run_rank("cache", cache_job(smoke, out))


def train_dit(smoke: Path, out: Path, cache: Path) -> None:
    jobs.run_rank("train", train_job(smoke, out, "dit"))


def train_decoder(smoke: Path, out: Path, cache: Path) -> None:
    jobs.run_rank("train", train_job(smoke, out, "decoder"))


def evaluate(smoke: Path, out: Path, cache: Path) -> None:
    jobs.run_rank("evaluate", changed(smoke / "evaluate", {"max_videos": 1}, out=out))


def predict(smoke: Path, out: Path, cache: Path) -> None:
    from flowmask.trainer.predict.predict import predict

    predict(smoke / "example.mp4", ["a red square"], checkpoint=str(smoke / "runs" / "dit"), out=out)


def verify(smoke: Path, out: Path, cache: Path) -> None:
    from flowmask.data_pipeline.check.verify import verify

    assert verify(cache, decode_masks=1).masks


def repair(smoke: Path, out: Path, cache: Path) -> None:
    from flowmask.data_pipeline.check.repair import repair
    from flowmask.data_pipeline.check.verify import verify
    from flowmask.launch.cli.cache_check import build_config

    repair(cache, found=lambda: verify(cache), config=lambda: build_config(cache, None, []), rebuild=[0])


def inspect(smoke: Path, out: Path, cache: Path) -> None:
    from flowmask.data_pipeline.show.inspect_page import inspect

    inspect(cache, out=out.with_suffix(".html"), examples=1)


@pytest.mark.parametrize(
    "job", [build, train_dit, train_decoder, evaluate, predict, verify, repair, inspect], ids=lambda j: j.__name__
)
def test_every_kind_of_job_computes_on_the_gpu_of_its_local_rank(
    job: Callable[..., None], smoke: Path, small_cache: Path, tmp_path: Path, node: Node8
) -> None:
    job(smoke, tmp_path / "out", small_cache)
    assert node.used == {f"cuda:{RANK}"}
    assert set(node.default) == {f"cuda:{RANK}"}  # the default of libraries


@pytest.mark.parametrize(
    ("variables", "gpus", "device"),
    [
        ({}, 8, "cuda:0"),
        ({"LOCAL_RANK": "7", "LOCAL_WORLD_SIZE": "8"}, 8, "cuda:7"),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}, 1, "cuda:0"),  # each rank sees its own GPU alone
    ],
)
def test_a_rank_takes_its_own_of_the_gpus_that_it_sees(
    variables: dict[str, str], gpus: int, device: str, node: Node8, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(rank_device(exclusive=True)) == device


@pytest.mark.parametrize(("gpus", "started_by"), [(4, None), (1, "FLOWMASK_PARENT")])
def test_ranks_share_a_gpu_except_those_of_a_training(
    gpus: int, started_by: str | None, node: Node8, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    if started_by is not None:
        monkeypatch.setenv(started_by, "1")
    assert str(rank_device()) == f"cuda:{5 % gpus}"
    with pytest.raises(ConfigError, match=f"^8 ranks train .* {gpus} GPUs?; .* at most {gpus}$"):
        rank_device(exclusive=True)


def test_more_ranks_of_a_training_than_gpus_are_refused_before_it_is_sent(smoke: Path, tmp_path: Path) -> None:
    launch = {"launch": {"processes_per_node": 2, "gpus_per_node": 1}}
    with pytest.raises(ConfigError, match=r"launch.processes_per_node is 2, launch.gpus_per_node 1"):
        validate(train_job(smoke, tmp_path, "dit", **launch), TrainJob, origin="a job")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("cache", {"cache": {"device": "cuda"}}, "cache.device is cuda"),
        ("evaluate", {"device": "cuda"}, "device is cuda"),
        ("cache", {"launch": {"gpus_per_node": 8}}, "launch.gpus_per_node is 8"),
        ("evaluate", {"launch": {"gpus_per_node": 8}}, "launch.gpus_per_node is 8"),
        ("train", {"launch": {"gpus_per_node": 8}}, "launch.gpus_per_node is 8"),
    ],
)
def test_a_gpu_that_was_asked_for_or_promised_is_never_replaced_by_the_cpu(
    kind: str, changes: dict[str, Any], message: str, smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = smoke / {"train": "runs/dit"}.get(kind, kind)
    with pytest.raises(ConfigError, match=f"^{message}, but .* shows no usable GPU.*; check nvidia-smi.* or set"):
        jobs.run_rank(kind, changed(folder, changes, out=tmp_path / "out"))
    assert not (tmp_path / "out" / "shards").exists()


def test_the_promise_reaches_every_rank_that_is_started(
    smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = smoke / "runs" / "dit" / "config.yaml"
    ended = flowmask("train", config, f"out={tmp_path / 'run'}", "launch.gpus_per_node=2")
    assert ended.returncode == 2
    assert [line for line in ended.stderr.splitlines() if "launch.gpus_per_node is 2, but" in line]
    assert "Traceback" not in ended.stderr


def test_a_job_that_is_told_to_compute_on_the_cpu_needs_no_gpu(smoke: Path, tmp_path: Path) -> None:
    told = {"launch": {"gpus_per_node": 8}, "cache": VALID["cache"] | {"device": "cpu"}}
    assert jobs.run_rank("cache", cache_job(smoke, tmp_path / "out", **told)) == 0


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 22.70 GiB.")


@pytest.mark.parametrize(
    ("job", "owner", "method", "named"),
    [
        (build, TextEncoder, "together", "cache.encoder_dtype"),
        (build, ClipEncoder, "_moments", "cache.batch_clips"),
        (repair, TextEncoder, "together", "cache.encoder_dtype"),
        (train_dit, Engine, "step", "train.micro_batch"),
        (evaluate, Segmenter, "encode_text", "sentences_per_batch"),
        (predict, Segmenter, "encode_text", "--window-frames"),
        (verify, verify_masks, "shown", "CUDA_VISIBLE_DEVICES"),
        (inspect, inspect_examples, "decode", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_is_full_is_one_line_that_names_what_to_lower(
    job: Callable[..., None],
    owner: Any,
    method: str,
    named: str,
    smoke: Path,
    small_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, method, MagicMock(side_effect=FULL))
    with pytest.raises(ConfigError, match=f"^the GPU's free memory does not hold [^\n]*{named}"):
        job(smoke, tmp_path / "out", small_cache)


def test_an_encoder_that_the_gpu_does_not_hold_is_named(
    smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", MagicMock(side_effect=FULL))
    with pytest.raises(ConfigError, match="does not hold the VAE; lower"):
        jobs.run_rank("cache", cache_job(smoke, tmp_path / "out"))


@pytest.mark.parametrize("said", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"])
def test_a_library_that_finds_the_gpu_full_is_understood_too(said: str) -> None:
    with pytest.raises(ConfigError, match="does not hold all; lower it"), gpu_holds("all", fix="lower it"):
        raise RuntimeError(said)


def test_another_error_on_a_gpu_keeps_its_trace() -> None:
    with pytest.raises(RuntimeError, match="illegal"), gpu_holds("all", fix="lower it"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
