# shellcheck shell=bash
# Settings that the three launch scripts share; sourced, not run. What is set already stays as it is.

# Pieces of memory that can grow: without it, batches of one size but chunks of two leave holes that no later block fits.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# One CPU thread for torch's own operators: the cores belong to DALI's threads, and the work is on the GPU.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# A failed collective ends the process instead of leaving wrong numbers; the launcher starts again from the last checkpoint.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# A log of the last 2000 collectives, which NCCL's own watchdog prints when one of them times out: it names the rank that lags.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# Warnings and errors only: NCCL's information is thousands of lines a rank.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Which python has fastmoco.
PYTHON="${PYTHON:-python}"
