#!/usr/bin/env bash
# Any number of machines: sbatch --nodes 4 launch/slurm.sh RECIPE --out FOLDER [overrides]
# FOLDER must be on a file system that all machines share. One task per GPU, without torchrun, so
# that signals and exit codes pass unchanged.
#SBATCH --job-name=fastmoco
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
# SIGUSR1 to every task 180 s before the time is up: the step is finished, the state saved, the job
# put back into the queue.
#SBATCH --signal=USR1@180
# After a machine's failure SLURM starts the job again by itself, and the run
# continues from its last checkpoint.
#SBATCH --requeue
# A restarted job appends to its log.
#SBATCH --open-mode=append
set -euo pipefail

# SLURM runs a copy of this script from its own spool: settings.sh is in the
# folder of the submission.
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

# The store in which ranks find each other is on the first machine. Its name becomes an argument of
# other programs, so only letters, digits, . and - are accepted.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[[ $MASTER_ADDR =~ ^[A-Za-z0-9][A-Za-z0-9.-]*$ ]] || { echo "host name '$MASTER_ADDR' refused: letters, digits, . and - only" >&2; exit 2; }
export MASTER_ADDR
# A port for this job only, because several jobs may share a machine. Below 32768: Linux assigns
# higher ports to outgoing connections, so one of those may be in use when the store starts.
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 17000))

# Remove the marks of an earlier start.
rm -f -- "$OUT/DONE" "$OUT/PREEMPTED"

# Ranks come from SLURM; exec, so that SLURM's signals reach python and not a shell.
# LOCAL_WORLD_SIZE is the number of tasks on this machine, e.g. "8(x4)" of SLURM_TASKS_PER_NODE.
# shellcheck disable=SC2016
as_rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE%%[!0-9]*}; exec "$@"'

# --kill-on-bad-exit: when one rank fails the others are killed, instead of waiting for it until the
# time is up. --cpu-bind=cores: a task's threads stay on its own cores, close to its GPU if SLURM
# knows the topology of the machine. --wait=0: after the last step rank 0 still draws the curves, and
# some clusters end a job soon after its first task has ended.
code=0
srun --kill-on-bad-exit=1 --wait=0 --cpu-bind=cores bash -c "$as_rank" rank "$PYTHON" -m fastmoco train "$@" || code=$?

if [[ -e $OUT/DONE ]]; then
    exit 0  # errors after the end of the run do not matter
fi
if [[ -e $OUT/PREEMPTED ]]; then
    scontrol requeue "$SLURM_JOB_ID"  # the same command continues the run
    exit 0
fi
exit "$code"
