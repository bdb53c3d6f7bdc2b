#!/usr/bin/env bash
# vit_nano8_e60_b256 with settings that change only its speed:
#     launch/vit_nano8_96px.sh --data.shards SHARDS --out FOLDER [overrides]
#
# Measured on AMD EPYC, 2 cores, 24 GiB; fastmoco 0.1.0, python 3.11.7, torch 2.13.0+cpu, numpy
# 2.4.6, dali 2.4.0; bf16.
# images per CPU-second, 2 pairs of measurements in turn, 4 steps each:
#   with these settings  120 (116 to 123)
#   with the defaults    106 (105 to 106)
#   ratio                1.134 (1.098 to 1.169)
#   ratio of images per second: 1.069 (0.885 to 1.254)
# Meanwhile other processes took 89% of the cores.
#
# Made on 2026-11-28 at commit f618316 by:
#     fastmoco tune vit_nano8_e60_b256 --model.image-size 96 --global-batch-size 64 --data.shards SHARDS --only allocator --budget 7m --out launch/vit_nano8_96px.sh
set -euo pipefail

# malloc asks the system for pages of 2 MiB.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
# malloc keeps the memory that a step has freed for the next one.
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"

# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "$0")/settings.sh"

# exec, so that signals to this script reach the run. Options of the caller come last
# and win.
exec "$PYTHON" -m fastmoco train vit_nano8_e60_b256 \
    --model.image-size 96 \
    --global-batch-size 64 \
    "$@"
