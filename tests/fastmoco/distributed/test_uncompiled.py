"""DDP is built and runs without torch._dynamo, and is as torch has it once that is imported."""

from __future__ import annotations

import subprocess
import sys

ONE_RANK = """
import sys, torch
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel as DDP
from fastmoco.distributed.uncompiled import ANSWER, spared_compiler

init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
layer, images = torch.nn.Linear(3, 2), torch.randn(4, 3)
plain = torch.autograd.grad(layer(images).sum(), layer.weight)[0]

def step(wrapper):
    layer.zero_grad()
    wrapper(images).sum().backward()
    assert torch.equal(layer.weight.grad, plain)

with spared_compiler():
    ours = DDP(layer)
assert "_dynamo" not in vars(torch)
for _ in range(2):
    step(ours)
assert "torch._dynamo" not in sys.modules

# Any other question imports the real one, also from within the context.
with spared_compiler():
    assert torch._dynamo.config.optimize_ddp is True
    assert torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"
assert torch._dynamo is sys.modules["torch._dynamo"]

method = DDP._inside_ddp_forward.__wrapped__.__wrapped__
assert getattr(method, ANSWER).__module__ == "fastmoco.distributed.uncompiled"
step(ours)
assert getattr(method, ANSWER).__module__ != "fastmoco.distributed.uncompiled"  # the compiler's
with spared_compiler():
    step(DDP(layer))
destroy_process_group()
"""
TORCH_ALONE = """
import sys, torch
torch.distributed.init_process_group(
    "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
)
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
assert "torch._dynamo" in sys.modules
"""
"""Fails if torch no longer needs `spared_compiler`; then it can go."""


def test_ddp_needs_no_dynamo_before_somebody_imports_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONE_RANK], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_torch_alone_imports_dynamo() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TORCH_ALONE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
