"""`import fastmoco_kernels` is cheap: torch, and neither triton nor anything of the trainer."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import torch
before = set(sys.modules)
import fastmoco_kernels
for name in fastmoco_kernels.__all__:
    getattr(fastmoco_kernels, name)
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(" ".join(sorted(roots & {"triton", "nvidia", "xformers", "apex", "flash_attn", "fastmoco", "fastmoco_pipelines", "tyro"})))
"""


def test_importing_the_ops_loads_no_backend_and_no_trainer():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
