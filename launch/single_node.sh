#!/bin/bash
# Every GPU of this machine; GPUS=4 uses four:
# launch/single_node.sh RECIPE --out FOLDER [overrides]
set -euo pipefail
here=${BASH_SOURCE[0]}
[[ $here == */* ]] || here=./$here
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "${here%/*}/settings.sh"

# nvidia-smi prints one line per GPU; without it, one process.
if [[ -z ${GPUS:-} ]]; then
    GPUS=$({ nvidia-smi --list-gpus 2>/dev/null || echo none; } | wc -l)
fi
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || { echo "GPUS=$GPUS: needs a whole number from 1 on" >&2; exit 2; }

# Each process uses the cores and the memory close to its GPU, so that decoded images cross no
# socket. torchrun of torch 2.13 binds them so by itself with one process per GPU.
#
# fastmoco starts torchrun, which restarts workers up to three times from their last checkpoint. Its
# exit code is 0, 75 (stopped by a signal after saving its state) or 1; torchrun itself would return 1
# for the last two.
exec "$PYTHON" -m fastmoco train "$@" --gpus "$GPUS"
