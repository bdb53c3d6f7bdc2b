#!/usr/bin/env bash
# One process on one GPU (or on the CPU): launch/single_gpu.sh RECIPE --out FOLDER [overrides]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "$0")/settings.sh"

# The first GPU unless told otherwise; a second run beside this one would share its memory.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

# exec: a signal to this script is a signal to the run.
exec "$PYTHON" -m fastmoco train "$@"
