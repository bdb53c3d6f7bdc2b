"""The settings that are measured: all that change only speed, in groups.

Settings of one group interact, so the group has combinations of them: threads of torch and of the
loader share the cores, kernels are compiled around one attention. Groups are independent enough to
be searched one by one from the defaults; the search combines the best of each at its end.

The list depends on config and machine alone and has a fixed order, the most promising first,
because a small budget measures only its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastmoco.config import Config
from fastmoco.planning.tuning.machine import COMPILERS, Machine
from fastmoco.planning.tuning.settings import Settings, Value

Group = Literal["cores", "allocator", "chunks", "blocks", "loader", "waiting", "binding"]
GROUPS: tuple[Group, ...] = get_args(Group)
"""Groups of settings, the most promising first."""
LEAST_CHUNK = 8
"""Images below which a chunk keeps no processor busy."""
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""malloc keeps freed memory and maps no large block by itself, so that the next step does not get
its pages from the system again."""
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""malloc asks the system for pages of 2 MiB."""
NEEDS_WALL = "processor time cannot compare it: take a quiet machine, or --criterion wall"
"""Why a setting is left out where images per CPU-second are compared."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings that may be faster than the defaults."""

    group: Group | Literal["all"]
    """`all`: settings of several groups."""
    settings: Settings
    slow_start: bool = False
    """Whether the first step takes long, e.g. because it compiles."""

    def __str__(self) -> str:
        return str(self.settings)


@dataclass(frozen=True, slots=True)
class Skipped:
    """What is not measured, and why."""

    group: Group
    what: str
    reason: str


Found = Candidate | Skipped


def space(
    config: Config,
    machine: Machine,
    resolved: Mapping[str, Any],
    *,
    given: Sequence[str] = (),
    only: Sequence[Group] = (),
    wall: bool = True,
    processes: int = 1,
) -> tuple[list[Candidate], list[Skipped]]:
    """What to measure for a config on a machine.

    Args:
        config: of the run.
        machine: at hand.
        resolved: what the config resolves to there, from the measurement of the defaults:
            `device_type`, `attention_backend`, `compiled`, `chunk`, `batch` (images of this
            process).
        given: names of fields that the user has set, which stay as they are.
        only: groups to measure; empty: all.
        wall: whether wall-clock time is compared; else processor time, which says nothing about
            threads that wait or share cores.
        processes: of the run on this machine, of which `machine` has one process's part.

    Returns:
        Candidates, the most promising first, and what is left out.
    """
    on_gpu = resolved["device_type"] == "cuda"
    makers: dict[Group, Iterator[Found]] = {
        "cores": _cores(machine, on_gpu),
        "allocator": _allocator(machine, on_gpu),
        "chunks": _chunks(config, resolved, on_gpu),
        "blocks": _blocks(config, machine, resolved, on_gpu),
        "loader": _loader(config, resolved, on_gpu),
        "waiting": _waiting(on_gpu),
        "binding": _binding(machine, processes),
    }
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    for group, found in makers.items():
        if only and group not in only:
            continue
        for one in found:
            reason = _reason(one, config, given, wall=wall) if isinstance(one, Candidate) else ""
            if isinstance(one, Skipped):
                skipped.append(one)
            elif reason:
                skipped.append(Skipped(group, str(one), reason))
            else:
                candidates.append(one)
    return _dealt(candidates), skipped


def _reason(one: Candidate, config: Config, given: Sequence[str], *, wall: bool) -> str:
    """Why a candidate is left out; empty if it is measured."""
    fixed = [name for name, _ in one.settings.options if name in given]
    if fixed:
        return f"{', '.join(fixed)} is given on the command line"
    if not wall and (one.group in ("cores", "waiting", "binding") or _is_ahead(one)):
        return NEEDS_WALL
    try:
        changed = one.settings.applied(config)
    except ValueError as error:
        return str(error)
    same = changed == config and not (one.settings.variables or one.settings.prefix)
    return "is the default" if same else ""


def _is_ahead(one: Candidate) -> bool:
    """Whether it makes batches earlier, at the same processor time."""
    return any(name == "data.prefetch" for name, _ in one.settings.options)


def _dealt(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of each group, then the second of each, and so on: a small budget reaches all
    groups."""
    place: dict[str, int] = {}
    ranked = []
    for one in candidates:
        place[one.group] = place.get(one.group, -1) + 1
        ranked.append((place[one.group], one))
    return [one for _, one in sorted(ranked, key=lambda pair: pair[0])]


def _set(group: Group, *, slow_start: bool = False, **options: Value) -> Candidate:
    """A candidate with options; `__` in a name is a dot."""
    pairs = tuple((name.replace("__", "."), value) for name, value in options.items())
    return Candidate(group, Settings(options=pairs), slow_start)


def _exported(group: Group, variables: Mapping[str, str]) -> Candidate:
    return Candidate(group, Settings(variables=tuple(variables.items())))


def _cores(machine: Machine, on_gpu: bool) -> Iterator[Found]:
    """How torch and the loader share the cores."""
    cores = len(machine.cores)
    if on_gpu:
        yield Skipped("cores", "threads of torch", "the work is on the GPU")
        for threads in _distinct(cores // 2, cores // 4, cores - 1):
            yield _set("cores", data__threads=threads)
        return
    if cores == 1:
        yield Skipped("cores", "threads of torch and the loader", "one core")
        return
    pairs = dict.fromkeys(
        (threads, loading)
        for loading in _distinct(1, cores // 4, cores // 2, cores)
        for threads in _distinct(cores, cores - loading, cores // 2)
        if (threads, loading) != (cores, cores)
    )
    for threads, loading in pairs:
        yield _set("cores", threads=threads, data__threads=loading)


def _chunks(config: Config, resolved: Mapping[str, Any], on_gpu: bool) -> Iterator[Found]:
    """Images of a pass through the encoder, and what its backward keeps."""
    batch, chunk = int(resolved["batch"]), int(resolved["chunk"])
    sizes = (chunk // 2, 2 * chunk) if chunk else (batch // 2, batch // 4, batch // 8)
    for size in _distinct(*sizes):
        if LEAST_CHUNK <= size < batch:
            yield _set("chunks", batch__chunk=size)
    yield _set("chunks", model__checkpointing="selective")
    yield _set("chunks", model__checkpointing="full")
    if chunk:
        yield _set("chunks", batch__chunk=chunk, batch__kept=0)
    if resolved["compiled"]:
        for budget in (1.0, 0.9):
            yield _set("chunks", batch__activation_budget=budget)
    graphs = _set(
        "chunks", batch__chunk=chunk or batch // 4, batch__kept=0, batch__cuda_graphs=True
    )
    if on_gpu:
        yield graphs
    else:
        yield Skipped("chunks", "CUDA graphs", "no CUDA device")


def _blocks(
    config: Config, machine: Machine, resolved: Mapping[str, Any], on_gpu: bool
) -> Iterator[Found]:
    """Attention, and how blocks are run."""
    if config.model.family != "vit":
        reason = f"{config.model.architecture} has no blocks of a ViT"
        yield Skipped("blocks", "attention, fused and compiled blocks", reason)
        return
    kernels = ("sdpa", "flash", "cudnn", "efficient", "triton", "fa4", "xformers")
    names = kernels if on_gpu else ("sdpa", "explicit")
    others = [name for name in names if name != resolved["attention_backend"]]
    yield _set("blocks", model__blocks="fused")
    for name in others:
        yield _set("blocks", model__attention=name)
    if not on_gpu:
        yield _set("blocks", model__blocks="fused", model__attention=others[0])

    # Compiled where they are not by default, and the other way round.
    if resolved["compiled"]:
        yield _set("blocks", model__compile=False)
    elif on_gpu or machine.programs & set(COMPILERS):
        yield _set("blocks", model__compile=True, slow_start=True)
    else:
        reason = f"needs a C++ compiler, and none of {', '.join(COMPILERS)} is on the path"
        yield Skipped("blocks", "compiled blocks", reason)


def _loader(config: Config, resolved: Mapping[str, Any], on_gpu: bool) -> Iterator[Found]:
    """Batches ahead, images of a run of DALI, and the type of the views."""
    if config.data.synthetic:
        yield Skipped("loader", "prefetch, images of a run, type of the views", "synthetic images")
        return
    batch = int(resolved["batch"])
    for size in _distinct(*((64, 256) if on_gpu else (batch // 4, batch // 2))):
        if LEAST_CHUNK <= size < batch:
            yield _set("loader", data__sub_batch=size)
    for ahead in (4, 1) if not on_gpu else (2, 3):
        yield _set("loader", data__prefetch=ahead)
    yield _set("loader", data__view_dtype="float32" if on_gpu else "uint8")
    yield Skipped("loader", "reading threads", "a loader has one, which waits for the disk")
    reason = "a share below 1 would let an image's levels depend on its neighbours in the batch"
    yield Skipped("loader", "share of the GPU's JPEG engines", reason if on_gpu else "no GPU")


def _allocator(machine: Machine, on_gpu: bool) -> Iterator[Found]:
    """What freed memory is kept, and in which pages."""
    if on_gpu:
        for setting in (
            "expandable_segments:False",
            "expandable_segments:True,garbage_collection_threshold:0.8",
            "max_split_size_mb:512",
        ):
            yield _exported("allocator", {"PYTORCH_CUDA_ALLOC_CONF": setting})
    if machine.glibc and not on_gpu:
        yield _exported("allocator", KEEP_FREED)
        yield _exported("allocator", HUGE_PAGES | KEEP_FREED)
        yield _exported("allocator", HUGE_PAGES)
        yield _exported("allocator", {"MALLOC_ARENA_MAX": "2"})
    elif not machine.glibc:
        yield Skipped("allocator", "MALLOC_* and GLIBC_TUNABLES", "malloc is not that of glibc")
    installed = dict(machine.allocators)
    for name in ("jemalloc", "tcmalloc"):
        file = installed.get(name) or installed.get(f"{name}_minimal")
        if file:
            yield _exported("allocator", {"LD_PRELOAD": file})
        else:
            yield Skipped("allocator", f"lib{name} by LD_PRELOAD", "not installed")


def _waiting(on_gpu: bool) -> Iterator[Found]:
    """How long threads of OpenMP spin while they wait."""
    if on_gpu:
        yield Skipped("waiting", "GOMP_SPINCOUNT", "torch has one thread on the CPU")
        return
    for spins in ("1000", "1000000"):
        yield _exported("waiting", {"GOMP_SPINCOUNT": spins})


def _binding(machine: Machine, processes: int) -> Iterator[Found]:
    """On which cores threads run."""
    if processes > 1:
        reason = "all processes would be bound to the same cores"
        yield Skipped("binding", "OMP_PROC_BIND, taskset, numactl", reason)
        return
    if len(machine.cores) == 1:
        yield Skipped("binding", "OMP_PROC_BIND, taskset, numactl", "one core")
        return
    if machine.nodes == 1:
        yield Skipped("binding", "numactl", "one NUMA node")
    elif "numactl" not in machine.programs:
        yield Skipped("binding", "numactl", "not installed")
    else:
        prefix = ("numactl", "--cpunodebind=0", "--membind=0")
        yield Candidate("binding", Settings(prefix=prefix))
    if len(machine.one_per_core) == len(machine.cores):
        yield Skipped("binding", "taskset", "each core runs one hardware thread")
    elif "taskset" not in machine.programs:
        yield Skipped("binding", "taskset", "not installed")
    else:
        cores = ",".join(map(str, machine.one_per_core))
        yield Candidate("binding", Settings(prefix=("taskset", "-c", cores)))
    yield _exported("binding", {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"})


def _distinct(*values: int) -> list[int]:
    """Positive values, each once, in their order."""
    return [value for value in dict.fromkeys(values) if value > 0]
