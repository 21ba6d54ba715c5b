"""Copies the code of a submitted job into its folder, so that later edits of the checkout do not change it.

    code/              the packages, first on the job's PYTHONPATH
    provenance.json    git commit, versions of the packages, Python, host
    environment.json   only the variables that change the results of a job (ENVIRONMENT)
    changes.patch      uncommitted changes of the checkout

A secret may be in any variable and in any change of the code, under any name. So only listed variables are saved,
and only the owner can read the last two files.
"""

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path

from flowmask.models.files import write_atomically
from flowmask.models.safe.secrets import write_private
from flowmask.trainer.state.provenance import PACKAGE, PROVENANCE, git

CODE = "code"
SOURCES = ("flowmask", "models", "data_pipeline", "trainer", "launch", "configs")  # in a checkout
ENVIRONMENT = (
    *("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_DEFAULT_ENV", "CONDA_PREFIX"),
    *("HOSTNAME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LOADEDMODULES", "MODULEPATH"),
    *("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
    *(
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    ),
    *(
        "NCCL_DEBUG",
        "NCCL_SOCKET_IFNAME",
        "NCCL_IB_DISABLE",
        "NCCL_IB_HCA",
        "NCCL_P2P_DISABLE",
        "NCCL_ALGO",
        "NCCL_PROTO",
    ),
    *(
        "GLOO_SOCKET_IFNAME",
        "DS_ACCELERATOR",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "DECORD_EOF_RETRY_MAX",
    ),
    *("SLURM_CLUSTER_NAME", "SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOB_PARTITION"),
)


def freeze(folder: Path) -> Path:
    """Write the snapshot of this code into `folder`; returns the folder for importing it."""
    code = folder / CODE
    shutil.copytree(PACKAGE, code / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    commit, patch = _git_state()
    facts = {
        "commit": commit,
        "changed": bool(patch),
        "python": platform.python_version(),
        "host": platform.node(),
        "packages": _versions(),
    }
    write_atomically(folder / PROVENANCE, json.dumps(facts, indent=1))
    here = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    write_private(folder / "environment.json", json.dumps(here, indent=1))
    write_private(folder / "changes.patch", patch)
    return code


def _versions() -> dict[str, str]:
    """Version of every installed distribution; of two copies on `sys.path` the first, which an import takes."""
    copies = reversed(list(importlib.metadata.distributions()))
    found = {each.metadata["Name"]: each.version for each in copies}
    return {name: found[name] for name in sorted(filter(None, found))}


def _git_state() -> tuple[str | None, str]:
    """Commit and uncommitted changes of the packages; (None, "") outside a checkout."""
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None, ""
    patch = git("diff", "--binary", "HEAD", "--", *SOURCES) or ""
    added = (git("ls-files", "--others", "--exclude-standard", "--", *SOURCES) or "").splitlines()
    return commit.strip(), patch + "".join(f"# not in the commit, copied whole into code/: {name}\n" for name in added)
