"""The parsers of a run: its folder, its checkpoints, weights, options and a launcher's variables."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.fuzz import samples
from benchmarks.fuzz.changes import (
    change_bytes,
    change_json,
    change_lines,
    change_pickle,
    change_safetensors,
    change_words,
    change_zip,
)
from benchmarks.fuzz.target import Change, Target
from fastmoco.checkpoint import CheckpointError, find_checkpoint
from fastmoco.checkpoint.choose import score_in
from fastmoco.checkpoint.folder import (
    MARKER,
    METADATA,
    STATE,
    TENSORS,
    _digest,
    fingerprint,
    marker_text,
    read_marker,
    read_state,
)
from fastmoco.checkpoint.inspection import inspect_checkpoints
from fastmoco.checkpoint.loading import load_checkpoint
from fastmoco.checkpoint.shards import write_shards
from fastmoco.checkpoint.whole_file import write_whole
from fastmoco.cli.recipe_commands import TrainArguments, parse_config
from fastmoco.config.launched import describe_launcher, first_host, read_launcher, tasks_per_node
from fastmoco.config.resolve import resolve
from fastmoco.config.serial import from_json, to_json
from fastmoco.distributed.mesh import World
from fastmoco.errors import EXIT_REFUSED, RunError
from fastmoco.evaluation.feature_cache import FeatureCache, FeaturePart
from fastmoco.evaluation.interface import saved_states
from fastmoco.faults.restarts import require_progress
from fastmoco.models.encoder_file import EncoderDescription, encoder_header, load_encoder
from fastmoco.models.precision import choose_precision
from fastmoco.models.weights.building import load_foreign
from fastmoco.models.weights.names import HF_VIT
from fastmoco.models.weights.reading import CONFIG, FOLDER_FILES, PREPROCESSOR, read_weights
from fastmoco.models.weights.writing import hf_config, hf_preprocessor, renamed
from fastmoco.recipes import quickstart_digits
from fastmoco.run import metrics_file
from fastmoco.run.curves import Panels
from fastmoco.run.folder import RunFolder
from fastmoco.run.identity import identify
from fastmoco.run.world_sizes import with_start, world_size_at
from fastmoco.training import resume
from fastmoco.training.start import close_if_finished, find_start
from fastmoco_kernels import tuning
from fastmoco_pipelines.spec import EvalSpec

_RUN_ID = "0123456789abcd"
_STEP = 3
_SECRET = "s3cr3t"  # noqa: S105 - must be shown nowhere
_WORLD = World()
_PRECISION = choose_precision(quickstart_digits().precision, _WORLD.device)
"""Of a run on this machine."""


def _state() -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    config = quickstart_digits()
    resolved = asdict(resolve(config, world_size=1, sample_count=1437))
    return {
        "config": to_json(config),
        "resolved": {**resolved, "precision": _PRECISION, "attention": "sdpa", "torch": "2.13"},
        "data": {"step": _STEP, "digest": "0" * 64, "seed": 0, "global_batch_size": 256}
        | {"order_version": 2},
        "monitors": {"knn": {"best": {"knn": 0.5}, "last": {"knn": 0.4}}},
        "rollback": {"pending": [[2, {"total": 1.0}]], "last": [1, 2], "count": 0},
        "score": {"name": "knn", "label": "kNN", "value": 0.5},
        "run_id": _RUN_ID,
        "twin_advanced": False,
    }


def _tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "model.encoder.a": torch.randn(4, 5, generator=rng),
        "model.encoder.b": torch.randn(3, generator=rng).bfloat16(),
        "optimizer.adamw.step": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }


# Checkpoints: one file is changed, and the marker fits it.


def _files(kind: str) -> dict[str, bytes]:
    """The files of a sound checkpoint, but for its marker."""

    def made(folder: Path) -> dict[str, bytes]:
        if kind == "whole":
            write_whole(folder / TENSORS, _tensors())
        else:
            write_shards(folder, _tensors(), None)
        (folder / STATE).write_text(json.dumps(_state(), indent=1))
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    if kind not in _made:
        _made[kind] = samples.in_folder(made)
    return _made[kind]


_made: dict[str, dict[str, bytes]] = {}


def _write_checkpoint(folder: Path, kind: str, changed: Mapping[str, bytes]) -> Path:
    """A run's folder with one checkpoint, whose marker fits its files."""
    path = folder / "checkpoints" / f"step_{_STEP:08d}"
    path.mkdir(parents=True)
    for name, content in {**_files(kind), **changed}.items():
        (path / name).write_bytes(content)
    files = {file.name: fingerprint(file) for file in sorted(path.iterdir())}
    text = marker_text(_STEP, files, world_size=1, saved_at="2026-11-22T01:55:00Z", run_id=_RUN_ID)
    (path / MARKER).write_text(text)
    (folder / "config.json").write_text(json.dumps({"run_id": _RUN_ID, "trusted_run_ids": []}))
    return path


def _read_tensors_of(kind: str, name: str) -> Callable[[Path, bytes, bytes], str]:
    def read(folder: Path, data: bytes, _: bytes) -> str:
        path = _write_checkpoint(folder, kind, {name: data})
        checkpoint = load_checkpoint(path)
        held = checkpoint.tensors
        return "accepted" if held.keys() == _tensors().keys() else "accepted, other names"

    return read


def _read_state(folder: Path, data: bytes, _: bytes) -> str:
    """What a start, `checkpoint list` and an export do with a state."""
    path = _write_checkpoint(folder, "whole", {STATE: data})
    inspect_checkpoints(folder)
    start = find_start(folder, _WORLD)
    try:
        checkpoint = start.checkpoint
        assert checkpoint is not None  # noqa: S101 - a type: the function is for starts with one
        score_in(checkpoint.state)
        config = quickstart_digits()
        resume.require_same_run(checkpoint, config, _PRECISION, True, start.folder)
        resume.order_version(checkpoint)
        resume.shuffle_window(checkpoint)
        resume.machine_changes(checkpoint, dict.fromkeys(resume.MACHINE_FIELDS, "other"))
        now = resolve(config, world_size=1, sample_count=1437)
        resume.schedule_changes(checkpoint, config, now)
        saved_states(checkpoint.state)
        encoder_header(checkpoint)
        if close_if_finished(start, config, _WORLD):
            return "accepted, finished"
    finally:
        start.folder.release()
    read_state(path)
    find_checkpoint(folder, best=True)
    return "accepted"


def _markers() -> list[bytes]:
    def made(folder: Path) -> bytes:
        return (_write_checkpoint(folder, "whole", {}) / MARKER).read_bytes()

    return [samples.in_folder(made)]


def _change_marker(rng: Random, data: bytes, seeds: list[bytes]) -> bytes:
    if rng.random() < 0.2:
        return change_bytes(rng, data, seeds)
    body = json.loads(data)
    del body["sha256"]
    changed = change_json(rng, json.dumps(body).encode())
    with contextlib.suppress(ValueError, RecursionError, TypeError):
        body = json.loads(changed)  # mostly with its right hash
        if isinstance(body, dict) and rng.random() < 0.9:
            return json.dumps(body | {"sha256": _digest(body)}, indent=1).encode()
    return changed


def _read_marker(folder: Path, data: bytes, _: bytes) -> str:
    path = _write_checkpoint(folder, "whole", {})
    (path / MARKER).write_bytes(data)
    inspect_checkpoints(folder)
    with contextlib.suppress(ValueError):
        read_marker(path)
    start = find_start(folder, _WORLD)
    start.folder.release()
    if start.checkpoint is None:
        return "no checkpoint"
    return "accepted"


# The folder of a run.


def _configs() -> list[bytes]:
    config = quickstart_digits()
    state = _state()
    content = {
        "config": to_json(config),
        "resolved": state["resolved"],
        "curves": {"figures": {"knn": "kNN"}, "lines": {"loss": {"knows nothing": 4.4}}},
        "data": state["data"],
        "run_id": _RUN_ID,
        "trusted_run_ids": ["f" * 14],
        "ranks": [[0, 1], [2, 2]],
    }
    return [(json.dumps(content, indent=2) + "\n").encode()]


def _read_config(folder: Path, data: bytes, _: bytes) -> str:
    (folder / "config.json").write_bytes(data)
    run = RunFolder(folder)
    saved = run.read_config()
    Panels.of(saved)
    with_start(saved, 2, 1)
    world_size_at(saved, 2)
    identify(run, _WORLD, trust_all=False)
    if "config" in saved:
        config = from_json(saved["config"], file=folder / "config.json")
        if from_json(json.loads(json.dumps(to_json(config)))) != config:
            return "accepted, with secrets taken out or a number that is no JSON"
    return "accepted"


def _metrics() -> list[bytes]:
    lines: list[dict[str, Any]] = [
        {"step": i, "time": 1.0 * i, "loss": 3.4 - i, "lr": 1e-4, "knn": 0.5, "wait_share": 0.0}
        for i in range(1, 7)
    ]
    lines[2] |= {"spike/total": 9.5, "rolled_back_to": 2}
    lines[3]["loss"] = None
    return [b"".join(json.dumps(line).encode() + b"\n" for line in lines)]


def _read_metrics(folder: Path, data: bytes, _: bytes) -> str:
    run = RunFolder(folder)
    run.metrics.write_bytes(data)
    metrics_file.read_curves(run.metrics, lambda name: True)
    metrics_file.read_spikes(run.metrics)
    metrics_file.last_step(run.metrics)
    run.read_metric("loss")
    run.trim_metrics(3)
    if any(step > 3 for step, _ in run.read_metric("loss")):
        return "VIOLATION: a later line is left"
    return "accepted"


def _starts() -> list[bytes]:
    return [
        b'{"launch": null, "step": 3, "starts": 2}\n',
        b'{"launch": "a", "step": 3, "starts": 3}\n',
    ]


def _read_starts(folder: Path, data: bytes, _: bytes) -> str:
    run = RunFolder(folder)
    run.starts.write_bytes(data)
    require_progress(run, 3)
    return "accepted"


# Features, weights, encoders.


def _cache(folder: Path) -> FeatureCache:
    cache = FeatureCache(folder, {"a": 1}, sample_ids=np.arange(4), row_bytes=32)
    cache.path.mkdir(parents=True)
    return cache


def _features() -> list[bytes]:
    def made(folder: Path) -> bytes:
        cache = _cache(folder)
        cache.write(0, FeaturePart(torch.ones(4, 8), torch.arange(4), torch.arange(4)))
        return cache._file(0).read_bytes()

    return [samples.in_folder(made)]


def _change_features(rng: Random, data: bytes, _: list[bytes]) -> bytes:
    changed = change_safetensors(rng, data[32:])
    return (hashlib.sha256(changed).digest() if rng.random() < 0.9 else data[:32]) + changed


def _read_features(folder: Path, data: bytes, _: bytes) -> str:
    cache = _cache(folder)
    cache._file(0).write_bytes(data)
    if not cache.finished():
        return "computed again"
    cache.rows()
    return "accepted"


def _encoder() -> tuple[EncoderDescription, Any]:
    torch.manual_seed(0)
    image = EvalSpec(size=8, resize=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    description = EncoderDescription(
        architecture="custom", width=12, depth=1, heads=3, patch_size=4, image=image
    )
    return description, description.build()


def _encoders() -> list[bytes]:
    def made(folder: Path) -> bytes:
        description, encoder = _encoder()
        notes = {"format": "pt", "step": "3", "method": "moco_v3", **description.to_metadata()}
        write_whole(folder / "e.safetensors", encoder.state_dict(), notes)
        return (folder / "e.safetensors").read_bytes()

    return [samples.in_folder(made)]


def _read_encoder(folder: Path, data: bytes, _: bytes) -> str:
    path = folder / "e.safetensors"
    path.write_bytes(data)
    load_encoder(path)
    return "accepted"


def _read_weights(folder: Path, data: bytes, _: bytes) -> str:
    path = folder / "weights.bin"
    path.write_bytes(data)
    read_weights(path)
    load_foreign(path, heads=3)
    return "accepted"


def _torch_files() -> list[bytes]:
    _, encoder = _encoder()
    state = encoder.state_dict()
    found = []
    for content, new in (({"epoch": 3, "state_dict": state}, True), (state, True), (state, False)):
        out = io.BytesIO()
        torch.save(content, out, _use_new_zipfile_serialization=new)
        found.append(out.getvalue())
    return found


def _change_torch(rng: Random, data: bytes, seeds: list[bytes]) -> bytes:
    if data[:2] == b"PK":
        return change_zip(rng, data)
    return change_pickle(rng, data) if rng.random() < 0.7 else change_bytes(rng, data, seeds)


def _descriptions() -> list[bytes]:
    description, encoder = _encoder()
    both = (hf_config(encoder, description), hf_preprocessor(description.image))
    return [json.dumps(one, indent=2).encode() for one in both]


def _read_description(folder: Path, data: bytes, sound: bytes) -> str:
    _, encoder = _encoder()
    path = folder / "hf"
    path.mkdir()
    write_whole(path / FOLDER_FILES[0], renamed(encoder.state_dict(), HF_VIT), {"format": "pt"})
    names = (CONFIG, PREPROCESSOR)
    for name, content in zip(names, _descriptions(), strict=True):
        (path / name).write_bytes(data if content == sound else content)
    load_foreign(path)
    return "accepted"


# Options, variables, tables of tiles.


def _commands() -> list[bytes]:
    words = (
        "quickstart_digits --out r --epochs 0.5 --optim.warmup-epochs 0 --global-batch-size 64",
        "vit_s16_e300_b1024 --out r --data.shards a-{0..9}.tar --gpus 2 --optim.lr=1e-4",
        f"quickstart_digits --out r --data.shards https://u:{_SECRET}@h/a.tar?token={_SECRET} --seed 3",
        "byol_digits --out r --model.image-size 16 --model.patch-size 2 --trust",
        "dino_digits --out=r --threads 1 --allow optim.lr epochs --checkpoint.every-steps 3",
    )
    return [line.replace(" ", "\0").encode() for line in words]


def _read_command(_: Path, data: bytes, sound: bytes) -> str:
    words = data.decode("utf-8", "surrogateescape").split("\0")
    said = io.StringIO()
    outcome = "refused"
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            parsed = parse_config(TrainArguments, "train", words)
            if parsed is not None:
                json.dumps(to_json(parsed.config))
                outcome = "accepted"
        except SystemExit as ended:
            if ended.code not in (0, EXIT_REFUSED):
                return f"VIOLATION: exit code {ended.code}"
    shown = said.getvalue()
    if "Traceback" in shown:
        return f"VIOLATION: a traceback: {shown.splitlines()[-1]}"
    if "\x1b" in shown or "\x07" in shown:
        return f"VIOLATION: control characters are shown: {shown!a:.120}"
    whole = any(f"https://u:{_SECRET}@h/" in word for word in words)
    if whole and f":{_SECRET}@" in shown:
        return f"VIOLATION: a secret is shown: {shown!a:.200}"
    return outcome


def _variables() -> list[bytes]:
    sets = (
        "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
        "SLURM_PROCID=1 SLURM_NTASKS=9 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=9 SLURM_NODEID=1 "
        "SLURM_STEP_TASKS_PER_NODE=8,1 SLURM_JOB_ID=77 SLURM_JOB_NODELIST=n[01-04,7],login "
        "MASTER_ADDR=n01",
        "SLURM_STEP_TASKS_PER_NODE=8(x4),2 SLURM_JOB_NODELIST=r[0-1]n[0-3] SLURM_PROCID=0 "
        "SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=34 SLURM_JOB_ID=1",
        "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1",
        "TORCHELASTIC_RUN_ID=x RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=h MASTER_PORT=1",
    )
    return [text.replace(" ", "\0").encode() for text in sets]


def _read_variables(_: Path, data: bytes, __: bytes) -> str:
    words = data.decode("utf-8", "surrogateescape").split("\0")
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    refused = 0
    with mock.patch.object(socket, "getaddrinfo", _no_names):  # no name is asked for
        for read in (
            lambda: describe_launcher(given),
            lambda: first_host(given.get("SLURM_JOB_NODELIST", "n1")),
            lambda: tasks_per_node(given.get("SLURM_STEP_TASKS_PER_NODE", "1")),
            lambda: read_launcher(given),
        ):
            try:
                read()
            except ValueError:
                refused += 1
    return "refused in part" if refused else "accepted"


def _no_names(*_: Any, **__: Any) -> Any:
    raise OSError("no name is looked up here")


def _tiles() -> list[bytes]:
    return [json.dumps({"info_nce|128|256": [64, 64, 4], "blur|7": [32, 1]}, indent=1).encode()]


def _read_tiles(folder: Path, data: bytes, _: bytes) -> str:
    path = folder / "gpu.json"
    path.write_bytes(data)
    tuning._load(path)
    tuning._read.discard(path)
    for key in [key for key in tuning._chosen if key[0] == path.stem]:
        del tuning._chosen[key]
    return "accepted"


def targets() -> dict[str, Target]:
    """The targets of this module."""
    run = (RunError, ValueError)
    one_file = (CheckpointError,)

    def json_or_bytes(indent: int | None) -> Change:
        def change(rng: Random, data: bytes, seeds: list[bytes]) -> bytes:
            if rng.random() < 0.8:
                return change_json(rng, data, indent=indent)
            return change_bytes(rng, data, seeds)

        return change

    def plain(change: Callable[[Random, bytes], bytes]) -> Change:
        return lambda rng, data, _: change(rng, data)

    def one(share: float, seeds, change, read, refusals=()) -> Target:  # type: ignore[no-untyped-def]
        return Target(share=share, seeds=seeds, change=change, read=read, refusals=refusals)

    return {
        "metrics": one(0.06, _metrics, plain(change_lines), _read_metrics, run),
        "config": one(0.06, _configs, json_or_bytes(2), _read_config, run),
        "starts": one(0.03, _starts, json_or_bytes(None), _read_starts, run),
        "marker": one(0.05, _markers, _change_marker, _read_marker, run),
        "state": one(0.05, lambda: [_files("whole")[STATE]], json_or_bytes(1), _read_state, run),
        "DCP metadata": one(
            0.1,
            lambda: [_files("shards")[METADATA]],
            plain(change_pickle),
            _read_tensors_of("shards", METADATA),
            one_file,
        ),
        "safetensors": one(
            0.08,
            lambda: [_files("whole")[TENSORS]],
            plain(change_safetensors),
            _read_tensors_of("whole", TENSORS),
            one_file,
        ),
        "encoder file": one(0.05, _encoders, plain(change_safetensors), _read_encoder, one_file),
        "weights": one(0.03, _encoders, plain(change_safetensors), _read_weights, one_file),
        "torch file": one(0.05, _torch_files, _change_torch, _read_weights, one_file),
        "description": one(0.03, _descriptions, json_or_bytes(2), _read_description, one_file),
        "feature part": one(0.03, _features, _change_features, _read_features, (RunError,)),
        "options": one(0.004, _commands, plain(change_words), _read_command),
        "variables": one(0.03, _variables, plain(change_words), _read_variables),
        "table of tiles": one(0.02, _tiles, json_or_bytes(1), _read_tiles),
    }
