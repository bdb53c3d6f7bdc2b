#!/bin/bash
# One process on one GPU (or on the CPU): launch/single_gpu.sh RECIPE --out FOLDER [overrides]
set -euo pipefail
here=${BASH_SOURCE[0]}
[[ $here == */* ]] || here=./$here
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "${here%/*}/settings.sh"

# The first GPU by default; a second run on it would share its memory.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

# exec, so that signals to this script reach the run.
exec "$PYTHON" -m fastmoco train "$@"
