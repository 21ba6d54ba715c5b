#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=32
#SBATCH --error=PLACE/runs/a/launch/0001/logs/%j_0_log.err
#SBATCH --exclude='bad[1-2]'
#SBATCH --gpus-per-node=4
#SBATCH --job-name=flowmask-train-a
#SBATCH --mem=204800M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=PLACE/runs/a/launch/0001/logs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=USR2@180
#SBATCH --time=720

# setup
module load cuda
export PYTHONPATH=PLACE/runs/a/launch/0001/code${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1  # the folder it was submitted in is often a checkout that goes on changing
[ -z "$SLURM_RESTART_COUNT" ] || PYTHON -P -m flowmask.launch.slurm.requeue PLACE/runs/a/launch/0001 || [ $? != 100 ] || exit 75
trap : TERM  # the last line below must be reached when SLURM takes the nodes back

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output PLACE/runs/a/launch/0001/logs/%j_%t_log.out --error PLACE/runs/a/launch/0001/logs/%j_%t_log.err --kill-on-bad-exit=1 --cpus-per-task=32 --container-image=image.sqsh PYTHON -u -m submitit.core._submit PLACE/runs/a/launch/0001/logs


# teardown
PYTHON -P -m flowmask.launch.slurm.requeue PLACE/runs/a/launch/0001 $?
