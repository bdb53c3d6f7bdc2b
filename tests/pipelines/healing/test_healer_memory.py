"""Memory stays bounded: what a burst of large images took is given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import io
import numpy as np
from PIL import Image
from fastmoco_pipelines.views.dali import ViewPipeline
from fastmoco_pipelines.views.draws import draw_views
from fastmoco_pipelines.spec import moco_v3_views

def jpeg(height, width):
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(out, "JPEG")
    return np.frombuffer(out.getvalue(), np.uint8), (height, width)

def run(images):
    sizes = np.array([size for _, size in images], np.int32)
    draws = [
        draw_views(view, seed=0, epoch=0, sample_ids=np.arange(len(images)), sizes=sizes, view=number)
        for number, view in ((1, VIEW1), (2, VIEW2))
    ]
    return PIPELINE.run([data for data, _ in images], draws)

def mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20

VIEW1, VIEW2 = moco_v3_views(32)
PIPELINE = ViewPipeline((VIEW1, VIEW2), batch_size=8, threads=2)
small, large = jpeg(100, 100), jpeg(4000, 5000)
for _ in range(20):
    run([small] * 8)
before = mib()
run([large] * 8)
for _ in range(300):
    run([small] * 8)
print(before, mib())
"""


@pytest.mark.slow
def test_a_burst_of_large_images_leaves_no_trace():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True
    )
    before, after = map(int, done.stdout.split())
    # Eight images of 57 MiB decoded, and as much again for what is cut from them, went through.
    assert after - before < 120, f"{before} MiB -> {after} MiB"
