"""The environment of SLURM's commands, and of a job that sbatch starts."""

import os

import pytest

from flowmask.launch.slurm import commands

KEPT = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "t", "HOME": "/root", "RANKING": "1", "MPI_HOME": "/opt/mpi"}
KEPT |= {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "4", "MY_SLURM_ID": "1"}
FOREIGN = (
    *(
        "SLURM_JOB_ID",
        "SLURM_JOBID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
        "SLURM_MEM_PER_CPU",
        "SLURMD_NODENAME",
    ),
    *("SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "SALLOC_ACCOUNT", "SQUEUE_STATES", "SCANCEL_USER", "SLURM_TIME_FORMAT"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "ROLE_WORLD_SIZE"),
    *(
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "PMI_RANK",
        "PMI2_X",
        "PMIX_NAMESPACE",
        "OMPI_COMM_WORLD_RANK",
    ),
    *("FLOWMASK_PARENT", "FLOWMASK_MEET", "FLOWMASK_LISTENER", "SPANK_X"),
)


def test_commands_of_slurm_see_no_job_no_group_and_no_options_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(KEPT))
    assert commands.environment() == KEPT
    os.environ |= dict.fromkeys(FOREIGN, "7")
    alone = {name: value for name, value in KEPT.items() if name != "CUDA_VISIBLE_DEVICES"}  # another job's GPUs
    assert commands.environment() == alone
    before = dict(os.environ)
    with pytest.raises(ValueError), commands.fresh_environment():
        assert dict(os.environ) == alone
        raise ValueError
    assert dict(os.environ) == before
    assert commands.ignored_options() == ["SBATCH_PARTITION"]
