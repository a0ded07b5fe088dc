#!/bin/bash
# Trains on a Slurm cluster. srun starts one task for each rank and tells it its number; the ranks meet on the
# first node of the step. Every node has to see the folders of Python, the configuration, the data and the run.
#
#     sbatch THIS_FILE
#
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=@RANKS_PER_NODE@
#SBATCH --cpus-per-task=@CPUS_PER_RANK@
#SBATCH --gpus-per-node=@GPUS_PER_NODE@
#SBATCH --time=@TIME@
#SBATCH --partition=@PARTITION@
#SBATCH --account=@ACCOUNT@
#SBATCH --chdir=@WORKDIR@
#SBATCH --output=@NAME@-%j.log
#SBATCH --open-mode=append
# Two minutes before the time is up, the ranks (not this script) get SIGTERM: they save a checkpoint and end well.
#SBATCH --signal=TERM@120
#SBATCH --requeue

set -euo pipefail

PYTHON=@PYTHON@
export SRUN_CPUS_PER_TASK=@CPUS_PER_RANK@ # srun no longer takes it over from --cpus-per-task by itself

# One rank that fails ends them all; what it said is in the log.
srun --mpi=none --kill-on-bad-exit=1 "$PYTHON" -m wastenot.launch.train @ARGUMENTS@

# A run that ended well without its summary was stopped by the clock: queue it again, and it goes on from there.
if [ ! -e @LOG_DIR@/summary.json ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
