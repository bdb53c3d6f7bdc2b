"""What a process of its own tries: `python -m fastmoco.training.checkup.probes NAME DEVICE` prints its
findings as the last line of its output. A probe that ends otherwise has failed."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fastmoco.training.checkup.findings import MARK, Finding
from fastmoco.training.checkup.packages import DALI, pip, pip_install, reinstall, wanted_dali
from fastmoco_pipelines.processes import follow_parent

OTHER_TORCH = (
    "choose the torch for this driver at https://pytorch.org/get-started/locally, and install it by "
    "the command shown there"
)
_DRIVER = Path("/proc/driver/nvidia/version")


def probe_torch(_: torch.device) -> list[Finding]:
    """Arithmetic on the CPU; the GPUs, and arithmetic on each of them."""
    _require_right_product(torch.device("cpu"))
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    version = f"{torch.__version__}, built {built}"
    driver = _driver()
    if torch.cuda.is_available():
        found = Finding(name="torch", state="works", text=version, needed=True)
        return [found, *(_gpu(index, driver) for index in range(torch.cuda.device_count()))]
    if not driver:
        absent = Finding(name="GPU", state="absent", text="none: training runs on the CPU")
        return [Finding(name="torch", state="works", text=version, needed=True), absent]

    # There is a GPU, but torch cannot use it.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.version.cuda:
        why, cure = "this torch was built for CPUs", OTHER_TORCH
    elif hidden is not None and hidden in ("", "-1", "NoDevFiles"):
        why = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it"
        cure = "unset CUDA_VISIBLE_DEVICES"
    else:
        why, cure = _refusal(), f"update the driver, or {OTHER_TORCH}"
    return [
        Finding(name="torch", state="works", text=version, needed=True),
        Finding(
            name="GPU",
            state="broken",
            text=f"driver {driver} has one, but torch cannot use it: {why}",
            cure=cure,
        ),
    ]


def _require_right_product(device: torch.device) -> None:
    """A product and its gradient, against numbers known without torch."""
    left = torch.arange(6.0, device=device).reshape(2, 3).requires_grad_()
    product = left @ torch.ones(3, 2, device=device)
    (gradient,) = torch.autograd.grad(product.sum(), left)
    if product.tolist() != [[3.0, 3.0], [12.0, 12.0]]:
        raise RuntimeError(f"a matrix product on {device} is wrong: {product.tolist()}")
    if gradient.tolist() != [[2.0] * 3] * 2:
        raise RuntimeError(f"the gradient of a matrix product on {device} is wrong")


def _driver() -> str:
    """Version of the NVIDIA driver of this machine; empty without one."""
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", _DRIVER.read_text())
    except OSError:
        return ""
    return found[1] if found else "of unknown version"


def _refusal() -> str:
    """Torch's own reason, its first sentence."""
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0].splitlines()[0]
    return "no reason given"


def _gpu(index: int, driver: str) -> Finding:
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(device)
    name = f"GPU {index}"
    text = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.1f} GiB"
    )
    try:
        _require_right_product(device)
        free = torch.cuda.mem_get_info(device)[0]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return Finding(
            name=name, state="broken", text=f"{text}: {reason}", cure=OTHER_TORCH, needed=index == 0
        )
    text += f" of which {free / 2**30:.1f} are free, driver {driver or 'of unknown version'}"
    from fastmoco_kernels.backends import OLDEST_CAPABILITY

    if (properties.major, properties.minor) < OLDEST_CAPABILITY:
        oldest = ".".join(map(str, OLDEST_CAPABILITY))
        why = f"; the Triton kernels need {oldest}: plain torch computes the same, slower"
        return Finding(name=name, state="weak", text=text + why)
    return Finding(name=name, state="works", text=text)


def probe_decoder(device: torch.device) -> list[Finding]:
    """Eight JPEGs by the decoder that training would use, beside Pillow's."""
    from fastmoco_pipelines.views import self_test
    from fastmoco_pipelines.views.runtime import WHY, dali_version, has_dali

    on_gpu = device.type == "cuda"
    cuda = (torch.version.cuda or "13").partition(".")[0]
    install = pip_install(wanted_dali(cuda if cuda in DALI else "13"))
    if on_gpu and not has_dali():
        return [
            Finding(
                name="decoder",
                state="broken",
                text=f"a GPU needs NVIDIA DALI, which {WHY}; on the CPU Pillow decodes: "
                "--data.device cpu",
                cure=install,
                needed=True,
            )
        ]
    where = "gpu" if on_gpu else "cpu"
    self_test.main([f"--device={where}", f"--device-id={device.index or 0}"])
    if has_dali():
        text = f"DALI {dali_version()} decoded eight JPEGs on the {where} as Pillow does"
        return [Finding(name="decoder", state="works", text=text, needed=True)]
    text = f"Pillow decoded eight JPEGs; NVIDIA DALI {WHY}, and only GPUs need it"
    return [Finding(name="decoder", state="works", text=text, needed=True)]


def probe_c_part(_: torch.device) -> list[Finding]:
    """The compiled part of the views, beside plain torch."""
    import numpy as np

    from fastmoco.training.checkup.surroundings import compiler
    from fastmoco_kernels import ViewColorParameters, cut_views
    from fastmoco_kernels.cut_views.native import native_library

    library = native_library()
    if library is None:
        first = "" if compiler() else "apt-get install gcc, then "
        return [
            Finding(
                name="C part",
                state="weak",
                text="not installed: plain torch cuts the views of exact color, slower",
                cure=first + reinstall(from_source=True),
            )
        ]
    image = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
    crops = torch.tensor([[3, 2, 31, 25]], dtype=torch.int32)
    neutral = ViewColorParameters.neutral(1)
    made = [
        cut_views([image], crops, neutral, size=16, backend=backend)
        for backend in ("native", "torch")
    ]
    if not torch.equal(*made):
        raise RuntimeError(f"{library._name} cuts other views than torch")
    return [Finding(name="C part", state="works", text=f"loaded from {library._name}")]


def probe_triton(device: torch.device) -> list[Finding]:
    """A kernel, compiled on a GPU, by the interpreter on a CPU, beside plain torch."""
    import triton

    from fastmoco_kernels import ema_update_

    made = []
    for backend in ("triton", "reference"):
        averages = [torch.linspace(0, 1, 1000, device=device)]
        ema_update_(averages, [torch.linspace(1, -1, 1000, device=device)], 0.75, backend=backend)
        made.append(averages[0])
    torch.testing.assert_close(*made, rtol=1e-6, atol=1e-6)
    how = "compiled and ran a kernel" if device.type == "cuda" else "its interpreter ran a kernel"
    return [Finding(name="Triton", state="works", text=f"{triton.__version__}: {how}")]


def probe_collectives(device: torch.device) -> list[Finding]:
    """The library that joins several processes: NCCL for GPUs, gloo for CPUs."""
    from fastmoco.distributed.self_test import try_all_reduce

    with tempfile.TemporaryDirectory(prefix="fastmoco-doctor-") as folder:
        what = try_all_reduce(device, Path(folder) / "store")
    name = "NCCL" if device.type == "cuda" else "gloo"
    return [Finding(name=name, state="works", text=f"{what} summed a tensor")]


def _by_attention(backend: str, device: torch.device) -> str:
    """Run attention by a backend, beside the reference."""
    from fastmoco_kernels import attention

    q, k, v = torch.randn(3, 2, 2, 65, 64, device=device, dtype=torch.bfloat16)
    made = attention(q, k, v, backend=backend)
    torch.testing.assert_close(made, attention(q, k, v, backend="reference"), rtol=0.05, atol=0.05)
    return f"--model.attention {backend} runs"


def probe_attention(device: torch.device) -> list[Finding]:
    """What computes attention if nothing is asked for."""
    from fastmoco_kernels import choose_attention

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = choose_attention(device, dtype, 197, 197, 64)
    _by_attention(chosen.backend, device)
    return [Finding(name="attention", state="works", text=f"by default {chosen}")]


def probe_xformers(device: torch.device) -> list[Finding]:
    """Its attention."""
    from fastmoco_kernels.attention.choice import require_xformers

    try:
        require_xformers()
    except ValueError as error:
        return [_refused("xformers", error)]
    version = importlib.metadata.version("xformers")
    importlib.import_module("xformers.ops")
    if device.type != "cuda":
        text = f"{version} can be imported; it needs a GPU to run"
        return [Finding(name="xformers", state="absent", text=text)]
    text = f"{version}: {_by_attention('xformers', device)}"
    return [Finding(name="xformers", state="works", text=text)]


def probe_flash_attention(device: torch.device) -> list[Finding]:
    """Version 4, through torch's switch."""
    from fastmoco_kernels.attention.choice import require_fa4

    if device.type != "cuda":
        return [Finding(name="flash-attn", state="absent", text="installed; it needs a GPU to run")]
    try:
        require_fa4(torch.cuda.get_device_capability(device))
    except ValueError as error:
        return [_refused("flash-attn", error)]
    return [Finding(name="flash-attn", state="works", text=_by_attention("fa4", device))]


def probe_apex(device: torch.device) -> list[Finding]:
    """NVIDIA's, not the other project of that name."""
    from fastmoco.optim.apex import require_apex

    try:
        require_apex()
    except ValueError as error:
        text = " ".join(str(error).split())
        uninstall = pip("uninstall", "apex")
        cure = uninstall if "another project" in text else ""
        text = text.removeprefix("fused_backend='apex': ").partition(" Use NVIDIA")[0]
        text = text.partition(" pip uninstall")[0].rstrip(".")
        return [Finding(name="apex", state="weak", text=text, cure=cure)]
    importlib.import_module("apex.optimizers")
    del device
    text = "NVIDIA's, with its CUDA kernels: --optim.fused-backend apex runs on GPUs"
    return [Finding(name="apex", state="works", text=text)]


def probe_torchao(device: torch.device) -> list[Finding]:
    """Float8 products need it, and a GPU of capability 8.9."""
    importlib.import_module("torchao.float8")
    version = importlib.metadata.version("torchao")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        text = f"{version} can be imported; float8 needs a GPU of compute capability 8.9 or newer"
        return [Finding(name="torchao", state="absent", text=text)]
    return [Finding(name="torchao", state="works", text=version)]


def probe_tensorboard(_: torch.device) -> list[Finding]:
    """A file of events that is written."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="fastmoco-doctor-") as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("loss", 1.0, 0)
        if not any(path.stat().st_size for path in Path(folder).iterdir()):
            raise RuntimeError("it wrote nothing")
    version = importlib.metadata.version("tensorboard")
    return [Finding(name="tensorboard", state="works", text=f"{version} wrote a file of events")]


def probe_step(device: torch.device) -> list[Finding]:
    """Two optimizer steps of a tiny ViT on synthetic images, by the trainer."""
    from fastmoco.config import Config, DataConfig, ModelConfig, OptimConfig
    from fastmoco.distributed.mesh import World
    from fastmoco.training.short_run import short_run
    from fastmoco_pipelines import ViewSpec

    view = ViewSpec(size=32)
    config = Config(
        epochs=1.0,
        global_batch_size=64,
        optim=OptimConfig(warmup_epochs=0.0),
        model=ModelConfig(
            architecture="vit_nano", image_size=32, patch_size=8, projection_dim=64, hidden_dim=128
        ),
        data=DataConfig(synthetic=True, view1=view, view2=view),
    )
    with short_run(config, World(device=device)) as trainer:
        losses = [trainer.step(trainer.loader.next()).loss.detach() for _ in range(2)]
        precision = trainer.precision
    if not all(torch.isfinite(loss) for loss in losses):
        raise RuntimeError(f"losses {[float(loss) for loss in losses]} are not finite")
    text = f"two steps of a tiny ViT in {precision} on {device.type}, losses are finite"
    return [Finding(name="training", state="works", text=text, needed=True)]


def _refused(name: str, error: ValueError) -> Finding:
    """A library that is there, but not as it is needed: the message ends with the cure."""
    text, _, cure = str(error).removeprefix("attention: ").partition("; ")
    cure = cure.replace("pip install", pip("install"), 1)
    return Finding(name=name, state="weak", text=text, cure=cure)


PROBES: dict[str, Callable[[torch.device], list[Finding]]] = {
    "torch": probe_torch,
    "decoder": probe_decoder,
    "c-part": probe_c_part,
    "triton": probe_triton,
    "collectives": probe_collectives,
    "attention": probe_attention,
    "xformers": probe_xformers,
    "flash-attn": probe_flash_attention,
    "apex": probe_apex,
    "torchao": probe_torchao,
    "tensorboard": probe_tensorboard,
    "training": probe_step,
}
"""By the name on the command line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Try one thing and print its findings."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=PROBES)
    parser.add_argument("device", choices=("cpu", "cuda"))
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if chosen.device == "cuda" else torch.device("cpu")
    findings = PROBES[chosen.name](device)
    print(f"\n{MARK}{json.dumps([asdict(found) for found in findings])}", flush=True)


if __name__ == "__main__":
    follow_parent()
    main()
