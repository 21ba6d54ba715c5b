"""The checks of `flowmask doctor`: each is a function from the subject to its findings.

Libraries are imported in other processes, so that a crash on import is a finding.
"""

import base64
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flowmask.launch.check.ask import ask, run
from flowmask.launch.check.attention import attention as check_attention
from flowmask.launch.check.preflight import existing
from flowmask.launch.finding import Finding, State, judged
from flowmask.launch.jobs import load_any, read_keys
from flowmask.launch.jobs.job import Job
from flowmask.models.errors import ConfigError, UserError
from flowmask.models.safe.secrets import masked_uri, without_secrets

_QUICKER = "fast reading of few frames of a long H.264 file"  # optional: av reads every file
_LIBRARIES = {
    "deepspeed": "trainer",
    "diffusers": "models",
    "transformers": "text encoder",
    "webdataset": "streamed shards",
    "av": "video files",
    "decord": _QUICKER,
    "pycocotools": "masks",
    "mlflow": "tracking",
    "submitit": "SLURM",
}
_MODULES: dict[str, Callable[[Any], object]] = {
    "transformer": lambda wan: wan.empty_transformer(video_injection=True),
    "vae": lambda wan: wan.empty_vae(),
}
_SLURM = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo")
_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
nccl = '.'.join(map(str, torch.cuda.nccl.version())) if gpus else None
bf16 = bool(gpus) and torch.cuda.is_bf16_supported()
d = torch.distributed
print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda, 'gpus': gpus, 'nccl': nccl, 'bf16': bf16,
                  'gloo': d.is_available() and d.is_gloo_available()}))
"""
_OPS = """
import json, sys
sys.modules['mlflow'] = None  # as in a rank: otherwise DeepSpeed imports it for its autotuner
from deepspeed.ops.op_builder.all_ops import ALL_OPS
print(json.dumps({name: bool(op.is_compatible(verbose=False)) for name, op in ALL_OPS.items()
                  if name in ('fused_adam', 'cpu_adam')}))
"""


@dataclass(frozen=True)
class Subject:
    """The subject of the checks: this machine, and the job if a config was given; `problem`: why there is no job."""

    out: Path
    job: Job | None = None
    problem: str = ""
    tracking_uri: str | None = None
    cluster: str = "local"
    partition: str | None = None


Question = Callable[[Subject], list[Finding]]


def subject_of(config: Path | None, overrides: Sequence[str] = ()) -> Subject:
    """The subject of a config. An invalid config becomes a finding, and the machine is still checked."""
    if config is None:
        return Subject(out=Path())
    tree = OmegaConf.create(read_keys(config, overrides))
    named = {
        "out": Path(OmegaConf.select(tree, "out") or "."),
        "tracking_uri": OmegaConf.select(tree, "tracking.uri"),
        "cluster": OmegaConf.select(tree, "launch.cluster") or "local",
        "partition": OmegaConf.select(tree, "launch.partition"),
    }
    try:
        return Subject(job=load_any(config, overrides)[0], **named)
    except ConfigError as error:
        return Subject(problem=str(error), **named)


def python(subject: Subject) -> list[Finding]:
    said = f"{platform.python_version()} at {sys.executable}"
    return [judged("python", sys.version_info >= (3, 11), said, "make PYTHON=python3.11 setup")]


def torch(subject: Subject) -> list[Finding]:
    facts, problem = ask(_TORCH)
    if facts is None:
        return [Finding("torch", "fail", problem, "make setup")]
    gpus, nccl, bf16, gloo = facts["gpus"], facts["nccl"], facts["bf16"], facts["gloo"]
    said = f"{len(gpus)} x {', '.join(sorted(set(gpus)))}" if gpus else "none is visible: only tiny models will train"
    fix = "on a GPU node: install a CUDA build of torch, and check nvidia-smi and CUDA_VISIBLE_DEVICES"
    findings = [
        Finding("torch", "pass", f"{facts['version']}, built for CUDA {facts['cuda'] or 'none'}"),
        judged("gpu", gpus, said, fix, otherwise="warn"),
        judged("gloo", gloo, str(gloo), "install a build of torch with gloo"),
    ]
    if gpus:
        findings.append(judged("nccl", nccl, nccl or "missing", "install a CUDA build of torch"))
        findings.append(judged("bf16", bf16, str(bf16), "set train.precision=fp32", otherwise="warn"))
    return findings


def libraries(subject: Subject) -> list[Finding]:
    code = "import importlib, sys; importlib.import_module(sys.argv[1])"
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        problems = list(pool.map(lambda name: run([sys.executable, "-c", code, name])[1], _LIBRARIES))
    findings = []
    for (name, purpose), problem in zip(_LIBRARIES.items(), problems, strict=True):
        said = f"for {purpose}: {problem}" if problem else importlib.metadata.version(name)
        findings.append(
            judged(name, not problem, said, "make setup", otherwise="warn" if purpose == _QUICKER else "fail")
        )
    return findings


def deepspeed_ops(subject: Subject) -> list[Finding]:
    facts, problem = ask(_OPS)
    if facts is None:
        return [Finding("deepspeed ops", "warn", problem, "pip install ninja, and a C++ compiler")]
    missing = [name for name, fits in facts.items() if not fits]
    said = f"can be built: {', '.join(n for n in facts if n not in missing) or 'none'}"
    said += f"; not {', '.join(missing)}" if missing else ""
    fix = "none needed unless you offload: torch's AdamW is used; cpu_adam needs a C++ compiler and ninja"
    return [judged("deepspeed ops", not missing, said, fix, otherwise="warn")]


def filesystem(subject: Subject) -> list[Finding]:
    """Free space, and the functions that caches and checkpoints need: rename over a file, hard links, a right clock."""
    place = existing(subject.out)
    free_gb = shutil.disk_usage(place).free / 1e9
    fix = "make room, or choose another out; `flowmask plan` says how much a job writes"
    said = f"{free_gb:.1f} GB free at {place}"
    findings = [judged("disk", free_gb >= 50, said, fix, otherwise="fail" if free_gb < 1 else "warn")]
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as name:
            findings += _probe(Path(name))
    except OSError as error:
        said = f"{place} cannot be written: {error.strerror}"
        findings.append(Finding("writable", "fail", said, "choose another out, or ask for write permission there"))
    return findings


def _probe(folder: Path) -> list[Finding]:
    first, second = folder / "first", folder / "second"
    first.write_text("1")
    second.write_text("2")
    second.replace(first)
    atomic = first.read_text() == "2" and not second.exists()
    exclusive = _links_once(first, folder / "linked")
    skew_s = abs(first.stat().st_mtime - time.time())
    wrong = "use a POSIX filesystem (NFS, Lustre, GPFS, BeeGFS, local), not an object store mount"
    clocks = f"the clocks of the filesystem and of this machine differ by {skew_s:.1f} s"
    fix = "synchronise the clocks (ntp); cache builds are safe: leases use the filesystem's clock"
    return [
        judged("atomic rename", atomic, "works" if atomic else "does not", wrong),
        judged("exclusive create", exclusive, "works" if exclusive else "does not", wrong),
        judged("clock", skew_s < 30, clocks, fix, otherwise="warn"),
    ]


def _links_once(source: Path, link: Path) -> bool:
    """Whether a hard link can be made exactly once: of several concurrent attempts only one succeeds."""
    try:
        os.link(source, link)
    except OSError:
        return False
    try:
        os.link(source, link)
    except FileExistsError:
        return True
    return False


def inputs(subject: Subject) -> list[Finding]:
    if subject.problem:
        return [Finding("config", "fail", subject.problem, "correct the config")]
    findings = []
    for each in subject.job.inputs() if subject.job else ():
        said, fix = str(each.path), f"correct {each.key}: it must be {each.what}"
        if not each.path.exists():
            said += " is missing"
        elif each.key == "model.wan" and (problem := _not_loadable(each.path)):
            said, fix = problem, "download Wan2.1-T2V-1.3B-Diffusers, or to try: flowmask tiny-wan DIR"
        findings.append(judged(each.key, said == str(each.path), said, fix))
    return findings


def _not_loadable(part: Path) -> str:
    """Why a part of Wan can't be built from its config; empty if it can, or if it has no config."""
    from flowmask.models.weights.wan import WanFolder

    try:
        if part.name in _MODULES:
            _MODULES[part.name](WanFolder(part.parent))
    except UserError as error:
        return str(error)
    return ""


def mlflow_server(subject: Subject) -> list[Finding]:
    uri = subject.tracking_uri
    if uri is None or not uri.startswith("http"):
        return [
            Finding(
                "mlflow server", "pass", f"none is configured; {masked_uri(uri or 'a file beside the run')} is used"
            )
        ]
    fix = "start it, or correct tracking.uri; training continues without it, and sends the data later"
    server = masked_uri(uri)
    try:
        parts = urllib.parse.urlsplit(uri)
        user, _, host = parts.netloc.rpartition("@")
        asked = urllib.request.Request(f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health")
        if user:
            word = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
            asked.add_header("Authorization", f"Basic {word}")
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return [Finding("mlflow server", "pass", f"{server} answers with status {answer.status}")]
    except (OSError, ValueError) as error:
        return [Finding("mlflow server", "warn", f"{server}: {without_secrets(str(error), uri=uri)}", fix)]


def slurm(subject: Subject) -> list[Finding]:
    wanted = subject.cluster == "slurm"
    away: State = "fail" if wanted else "warn"
    if missing := [name for name in _SLURM if shutil.which(name) is None]:
        fix = "run on the login node, or launch.cluster=local"
        return [Finding("slurm", away, f"no {', '.join(missing)} here", fix)]
    nodes, problem = run(["sinfo", "--noheader", "--format=%P %a %D %l %t"])
    if problem:
        return [Finding("slurm", away, problem, "ask the administrators of the cluster")]
    findings = [Finding("slurm", "pass", "; ".join(nodes.split("\n")))]
    problem = run(["sacct", "--noheader", "--format=JobID", "--starttime=now"])[1]
    fix = "without accounting the reason of a lost job stays unknown; ask the administrators of the cluster"
    findings.append(judged("slurm accounting", not problem, problem or "answers", fix, otherwise="warn"))
    known = [re.sub(r"\W+$", "", line.split(" ")[0]) for line in nodes.splitlines()]
    if subject.partition is not None and subject.partition not in known:
        fix = f"launch.partition: one of {', '.join(sorted(set(known)))}"
        findings.append(Finding("partition", "fail", f"{subject.partition} is unknown", fix))
    return [*findings, _seen_from_a_node(subject)] if wanted else findings


def _seen_from_a_node(subject: Subject) -> Finding:
    """Whether a compute node sees a file written here; checked only if a node is free at once."""
    check, place = "shared filesystem", existing(subject.out)
    partition = [f"--partition={subject.partition}"] if subject.partition else []
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=place) as file:
            command = ["srun", "--immediate=15", "--ntasks=1", "--time=1", *partition, "cat", file.name]
            problem = run(command, timeout_s=60)[1]
    except OSError as error:
        return Finding(check, "fail", f"{place} cannot be written: {error.strerror}", "choose another out")
    if not problem:
        return Finding(check, "pass", f"a compute node sees {place}")
    if "No such file" in problem:
        return Finding(check, "fail", f"a compute node does not see {place}", "put `out` on a shared filesystem")
    return Finding(check, "warn", f"unknown: {problem}", "run doctor again when a node is free")


def attention(subject: Subject) -> list[Finding]:
    return list(check_attention(subject.job, here=subject.cluster != "slurm")) if subject.job else []


QUESTIONS: tuple[Question, ...] = (
    *(python, torch, libraries, deepspeed_ops, filesystem, inputs, attention, mlflow_server, slurm),
)
