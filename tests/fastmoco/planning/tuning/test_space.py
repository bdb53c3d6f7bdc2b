"""Which settings are measured where: on a CPU, a GPU, with other cores and with given options."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastmoco.config import Config
from fastmoco.config.serial import may_change
from fastmoco.planning.tuning.machine import Machine, this_machine
from fastmoco.planning.tuning.settings import Settings
from fastmoco.planning.tuning.space import GROUPS, space
from fastmoco.recipes import get_recipe
from fastmoco_pipelines.spec import Resume

CPU = {"device_type": "cpu", "attention_backend": "sdpa", "compiled": False, "chunk": 0}
GPU = {"device_type": "cuda", "attention_backend": "sdpa", "compiled": True, "chunk": 128}
TWO = Machine(cores=(0, 1), one_per_core=(0, 1), programs=frozenset({"g++"}))
LARGE = Machine(
    cores=tuple(range(32)),
    one_per_core=tuple(range(16)),
    nodes=2,
    programs=frozenset({"taskset", "numactl"}),
    allocators=(("jemalloc", "libjemalloc.so.2"), ("tcmalloc_minimal", "libtcmalloc_minimal.so.4")),
)


def found(recipe: str = "vit_nano8_e60_b256", machine: Machine = TWO, resolved=CPU, **more):  # type: ignore[no-untyped-def]
    config = get_recipe(recipe)
    batch = {"batch": config.global_batch_size}
    candidates, skipped = space(config, machine, resolved | batch, **more)
    return list(map(str, candidates)), {one.what: one.reason for one in skipped}


def test_a_cpu_has_threads_chunks_blocks_a_loader_and_malloc() -> None:
    names, skipped = found()
    for name in (
        "--threads 1 --data.threads 1",
        "--threads 2 --data.threads 1",
        "--batch.chunk 64",
        "--model.checkpointing full",
        "--model.attention explicit",
        "--model.blocks fused",
        "--model.compile True",
        "--data.prefetch 4",
        "--data.sub-batch 64",
        "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296",
        "GOMP_SPINCOUNT=1000",
        "OMP_PROC_BIND=close OMP_PLACES=cores",
    ):
        assert name in names
    assert len(names) == len(set(names))
    assert "--threads 2 --data.threads 2" not in names  # the defaults on two cores
    assert skipped["CUDA graphs"] == "no CUDA device"
    assert skipped["libjemalloc by LD_PRELOAD"] == "not installed"
    assert skipped["numactl"] == "one NUMA node"
    # A small budget reaches every group.
    assert names[0].startswith("--threads")
    assert any("MALLOC" in name for name in names[: len(GROUPS)])


def test_a_large_machine_is_bound_and_has_other_allocators() -> None:
    names, skipped = found(machine=LARGE)
    assert "numactl --cpunodebind=0 --membind=0" in names
    assert f"taskset -c {','.join(map(str, range(16)))}" in names
    assert "LD_PRELOAD=libjemalloc.so.2" in names
    assert "LD_PRELOAD=libtcmalloc_minimal.so.4" in names
    assert "--threads 24 --data.threads 8" in names
    assert "needs a C++ compiler" in skipped["compiled blocks"]
    names, skipped = found(machine=LARGE, processes=2, only=("binding",))
    assert names == []
    assert "bound to the same cores" in skipped["OMP_PROC_BIND, taskset, numactl"]


def test_a_gpu_has_graphs_kernels_and_its_own_allocator() -> None:
    names, skipped = found("vit_s16_e300_b1024", LARGE, GPU)
    for name in (
        "--batch.chunk 64",
        "--batch.chunk 256",
        "--batch.chunk 128 --batch.kept 0",
        "--batch.chunk 128 --batch.kept 0 --batch.cuda-graphs",
        "--batch.activation-budget 0.9",
        "--model.attention flash",
        "--model.compile False",
        "--data.threads 16",
        "--data.view-dtype float32",
        "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512",
    ):
        assert name in names
    assert not any("MALLOC" in name or "SPIN" in name for name in names)
    assert "neighbours in the batch" in skipped["share of the GPU's JPEG engines"]


def test_what_does_not_apply_is_left_out_with_the_reason() -> None:
    names, skipped = found(given=("threads", "batch.chunk"), only=("cores", "chunks"))
    assert names == ["--model.checkpointing selective", "--model.checkpointing full"]
    assert skipped["--batch.chunk 64"] == "batch.chunk is given on the command line"
    names, skipped = found(wall=False)
    assert not any("threads" in name or "OMP" in name or "prefetch" in name for name in names)
    assert "processor time cannot compare it" in skipped["GOMP_SPINCOUNT=1000"]
    _, skipped = found("resnet50_e300_b4096")
    assert "no transformer blocks" in skipped["attention, fused and compiled blocks"]
    assert "which resnet50 does not have" in skipped["--model.checkpointing selective"]
    _, skipped = found("moby_swin_t4_e300_b512")
    assert "swin_tiny have one form" in skipped["attention, fused and compiled blocks"]


@pytest.mark.parametrize("resolved", [CPU, GPU], ids=["processor", "accelerator"])
def test_every_option_may_change_on_resume_and_is_accepted(resolved: dict[str, object]) -> None:
    """What changes only speed may differ in a run that continues; attention is the exception."""
    config = replace(get_recipe("vit_s16_e300_b1024"))
    candidates, _ = space(config, LARGE, resolved | {"batch": 1024})
    for one in candidates:
        changed = one.settings.applied(config)
        assert isinstance(changed, Config)
        for name, _ in one.settings.options:
            assert name == "model.attention" or may_change(config, name, Resume.FREE), name


def test_settings_are_joined_typed_and_applied() -> None:
    one = Settings((("threads", 1),), (("A", "1"),))
    both = one | Settings((("threads", 2), ("batch.cuda_graphs", True)), (("B", "x y"),), ("nice",))
    assert str(both) == "--threads 2 --batch.cuda-graphs A=1 B='x y' nice"
    assert both.applied(get_recipe("quickstart_digits")).threads == 2
    assert str(Settings()) == "defaults"


def test_the_line_of_a_machine_has_its_processor_and_no_name() -> None:
    import platform

    line = this_machine().line("cpu", {"torch": "2.13"})
    assert line.endswith("; torch 2.13")
    assert "core" in line
    assert platform.node() not in line or platform.node() in ("", "localhost")
