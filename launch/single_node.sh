#!/usr/bin/env bash
# Every GPU of this machine: launch/single_node.sh RECIPE --out FOLDER [overrides];  GPUS=4 takes four.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "$0")/settings.sh"

# nvidia-smi prints one line a GPU; without it, one process.
if [[ -z ${GPUS:-} ]]; then
    GPUS=$({ nvidia-smi --list-gpus 2>/dev/null || echo none; } | wc -l)
fi
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || { echo "GPUS=$GPUS: needs a whole number from 1 on" >&2; exit 2; }

# Each process on the cores and the memory beside its GPU: decoded images then cross no socket. torch 2.13's torchrun
# binds them so by itself where there is one process a GPU.
#
# fastmoco starts torchrun's agent, restarts workers up to three times from their last checkpoint, and answers 0, 75 (stopped
# by a signal, state saved) or 1; torchrun by itself would answer 1 for both of the last.
exec "$PYTHON" -m fastmoco train "$@" --gpus "$GPUS"
