#!/bin/bash
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

# The lines of settings.sh: SLURM runs a copy of this script from its own spool, and the folder of
# the submission may be anybody's.
# Nothing from the current folder runs, be it a module or a program: an empty part of these lists, or
# a relative one of PATH, would be there.
absolute() {
    local part parts kept=""
    IFS=: read -ra parts <<<"$1"
    for part in "${parts[@]}"; do
        # A folder that somebody has named stays, e.g. `src`.
        [[ -z $part || $part == /* || -z $2 || $part -ef . ]] || part=$2/$part
        [[ $part != /* ]] || kept+=":$part"
    done
    echo "${kept#:}"
}
PATH=$(absolute "$PATH" "")
PATH=${PATH:-/usr/bin:/bin}  # an empty one is the current folder again
[[ -z ${PYTHONPATH:-} ]] || PYTHONPATH=$(absolute "$PYTHONPATH" "$PWD")
# `python -m` would look there first.
export PYTHONSAFEPATH="${PYTHONSAFEPATH:-1}"

# Expandable segments: without them, micro-batches of two sizes fragment the memory.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# One CPU thread for torch's own operators: DALI's threads need the cores, and
# the work is on the GPU.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# A failed collective ends the process instead of giving wrong results; the launcher restarts it
# from the last checkpoint.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# A log of the last 2000 collectives, which NCCL's watchdog prints after a timeout; it shows the
# rank that is late.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# Warnings and errors only: NCCL's information would be thousands of lines per rank.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# The python in which fastmoco is installed.
PYTHON="${PYTHON:-python}"

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

# The marks of an earlier start, which only a process that holds the folder removes.
state() { stat --format="%i %z" -- "$OUT/$1" 2>/dev/null || true; }
done_before=$(state DONE)
preempted_before=$(state PREEMPTED)

# fastmoco reads ranks and the first machine from the variables of srun. Variables of an outer
# launcher would come first.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR

# --kill-on-bad-exit: when one rank fails the others are killed, instead of waiting for it until the
# time is up. --cpu-bind=cores: a task's threads stay on its own cores, close to its GPU if SLURM
# knows the topology of the machine. --wait=0: after the last step rank 0 still draws the curves, and
# some clusters end a job soon after its first task has ended.
code=0
srun --kill-on-bad-exit=1 --wait=0 --cpu-bind=cores "$PYTHON" -m fastmoco train "$@" || code=$?

# A refused job has changed nothing: marks that are new are those of another one.
if [[ $code == 2 ]]; then
    exit 2
fi
if [[ -e $OUT/DONE && $(state DONE) != "$done_before" ]]; then
    exit 0  # errors after the end of the run do not matter
fi
if [[ -e $OUT/PREEMPTED && $(state PREEMPTED) != "$preempted_before" ]]; then
    scontrol requeue "$SLURM_JOB_ID"  # the same command continues the run
    exit 0
fi
exit "$code"
