#!/bin/bash

# Parameters
#SBATCH --array=0-7%3
#SBATCH --cpus-per-task=10
#SBATCH --error=PLACE/caches/a/launch/0001/logs/%A_%a_0_log.err
#SBATCH --gpus-per-node=2
#SBATCH --job-name=flowmask-cache-a
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=PLACE/caches/a/launch/0001/logs/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@90

# setup
export PYTHONPATH=PLACE/caches/a/launch/0001/code${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1  # the folder it was submitted in is often a checkout that goes on changing
[ -z "$SLURM_RESTART_COUNT" ] || PYTHON -P -m flowmask.launch.slurm.requeue PLACE/caches/a/launch/0001 || [ $? != 100 ] || exit 75
trap : TERM  # the last line below must be reached when SLURM takes the nodes back

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output PLACE/caches/a/launch/0001/logs/%A_%a_%t_log.out --error PLACE/caches/a/launch/0001/logs/%A_%a_%t_log.err --kill-on-bad-exit=1 --cpus-per-task=10 PYTHON -u -m submitit.core._submit PLACE/caches/a/launch/0001/logs


# teardown
PYTHON -P -m flowmask.launch.slurm.requeue PLACE/caches/a/launch/0001 $?
