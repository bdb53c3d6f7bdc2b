#!/usr/bin/env bash
# Any number of machines: sbatch --nodes 4 launch/slurm.sh RECIPE --out FOLDER [overrides]
# FOLDER must lie on a file system that all machines share. One task a GPU, without torchrun: signals and exit codes pass unchanged.
#SBATCH --job-name=fastmoco
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
# SIGUSR1 to every task 180 s before the time is up: the step is finished, the state saved, the job put back into the queue.
#SBATCH --signal=USR1@180
# After a machine's failure SLURM starts the job again by itself, and the run continues from its last checkpoint.
#SBATCH --requeue
# The log of the job goes on where it was.
#SBATCH --open-mode=append
set -euo pipefail

# SLURM runs a copy of this script from its own spool: settings.sh lies where the job was submitted from.
LAUNCH="${FASTMOCO_LAUNCH:-${SLURM_SUBMIT_DIR:-$PWD}/launch}"
[[ -e $LAUNCH/settings.sh ]] || { echo "no $LAUNCH/settings.sh: submit from the repository, or set FASTMOCO_LAUNCH" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$LAUNCH/settings.sh"

OUT=""
for ((i = 1; i < $#; i++)); do
    if [[ ${!i} == --out ]]; then
        next=$((i + 1))
        OUT=${!next}
    fi
done
[[ -n $OUT ]] || { echo "usage: sbatch launch/slurm.sh RECIPE --out FOLDER [overrides]" >&2; exit 2; }

# The first machine holds the store in which the ranks meet. A name goes into other programs' arguments: letters, digits, . and -.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[[ $MASTER_ADDR =~ ^[A-Za-z0-9][A-Za-z0-9.-]*$ ]] || { echo "host name '$MASTER_ADDR' refused: letters, digits, . and - only" >&2; exit 2; }
export MASTER_ADDR
# A port of this job's own: jobs that share a machine must not meet each other. Below 32768, where Linux begins to hand out
# ports to whoever connects to anything: one of those may be taken at the moment the store wants it.
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 17000))

# The marks of an earlier start say nothing of this one.
rm -f -- "$OUT/DONE" "$OUT/PREEMPTED"

# A rank's place comes from SLURM; exec, so that SLURM's signals reach python and not a shell. LOCAL_WORLD_SIZE is what this
# machine has, e.g. "8(x4)" of SLURM_TASKS_PER_NODE.
# shellcheck disable=SC2016
as_rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE%%[!0-9]*}; exec "$@"'

# --kill-on-bad-exit: when one rank fails the others are ended, instead of waiting for it until the time is up.
# --cpu-bind=cores: a task's threads stay on its own cores, beside its GPU where SLURM knows the machine's topology.
code=0
srun --kill-on-bad-exit=1 --cpu-bind=cores bash -c "$as_rank" rank "$PYTHON" -m fastmoco train "$@" || code=$?

if [[ -e $OUT/DONE ]]; then
    exit 0  # whatever happened while the processes went down
fi
if [[ -e $OUT/PREEMPTED ]]; then
    scontrol requeue "$SLURM_JOB_ID"  # the same command continues the run
    exit 0
fi
exit "$code"
