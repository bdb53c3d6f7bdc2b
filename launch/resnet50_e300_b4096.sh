#!/bin/bash
# resnet50_e300_b4096 with settings that change only its speed:
#     launch/resnet50_e300_b4096.sh --data.shards SHARDS --out FOLDER [overrides]
#
# Not measured on a GPU: the choice of the planner (fastmoco plan) for 8 GPUs of 80GiB, 512 images
# each, bf16:
#     all images at once; checkpointing none; +0.0% FLOPs; 45.3 GiB at the peak.
# On the GPU, `fastmoco tune` without --plan-only replaces this file by a measured one.
#
# Made on 2026-11-28 at commit 00530b0 by:
#     fastmoco tune resnet50_e300_b4096 --plan-only --gpus 8 --memory 80GiB --out launch/resnet50_e300_b4096.sh
set -euo pipefail

here=${BASH_SOURCE[0]}
[[ $here == */* ]] || here=./$here
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "${here%/*}/settings.sh"

# exec, so that signals to this script reach the run. Options of the caller come last
# and win.
exec "$PYTHON" -m fastmoco train resnet50_e300_b4096 \
    --gpus 8 \
    "$@"
