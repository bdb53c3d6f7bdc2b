# shellcheck shell=bash
# Settings that the launch scripts share; sourced, not run. Variables that are set
# already keep their values.

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
