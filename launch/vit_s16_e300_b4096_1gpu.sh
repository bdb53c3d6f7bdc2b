#!/bin/bash
# vit_s16_e300_b4096 with settings that change only its speed:
#     launch/vit_s16_e300_b4096_1gpu.sh --data.shards SHARDS --out FOLDER [overrides]
#
# Not measured on a GPU: the choice of the planner (fastmoco plan) for 1 GPU of 80GiB, 4096 images
# each, bf16:
#     33 chunks of 128 images, 1888 keep their graphs; checkpointing none; +13.4% FLOPs; 69.5 GiB
#     at the peak.
# On the GPU, `fastmoco tune` without --plan-only replaces this file by a measured one.
#
# Made on 2026-11-28 at commit 00530b0 by:
#     fastmoco tune vit_s16_e300_b4096 --plan-only --memory 80GiB --out launch/vit_s16_e300_b4096_1gpu.sh
set -euo pipefail

here=${BASH_SOURCE[0]}
[[ $here == */* ]] || here=./$here
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "${here%/*}/settings.sh"

# The first GPU by default; a second run on it would share its memory.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

# exec, so that signals to this script reach the run. Options of the caller come last
# and win.
exec "$PYTHON" -m fastmoco train vit_s16_e300_b4096 \
    --batch.chunk 128 \
    --batch.activation-budget 0.9 \
    "$@"
