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
for ((i = 1; i <= $#; i++)); do
    if [[ ${!i} == --out ]]; then
        next=$((i + 1))
        OUT=${!next:-}
    elif [[ ${!i} == --out=* ]]; then
        OUT=${!i#--out=}
    fi
done
[[ -n $OUT ]] || { echo "usage: sbatch launch/slurm.sh RECIPE --out FOLDER [overrides]" >&2; exit 2; }

# Remove the marks of an earlier start.
rm -f -- "$OUT/DONE" "$OUT/PREEMPTED"

# fastmoco reads ranks and the first machine from the variables of srun. Variables of an outer
# launcher would come first.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR

# --kill-on-bad-exit: when one rank fails the others are killed, instead of waiting for it until the
# time is up. --cpu-bind=cores: a task's threads stay on its own cores, close to its GPU if SLURM
# knows the topology of the machine. --wait=0: after the last step rank 0 still draws the curves, and
# some clusters end a job soon after its first task has ended.
code=0
srun --kill-on-bad-exit=1 --wait=0 --cpu-bind=cores "$PYTHON" -m fastmoco train "$@" || code=$?

if [[ -e $OUT/DONE ]]; then
    exit 0  # errors after the end of the run do not matter
fi
if [[ -e $OUT/PREEMPTED ]]; then
    scontrol requeue "$SLURM_JOB_ID"  # the same command continues the run
    exit 0
fi
exit "$code"
