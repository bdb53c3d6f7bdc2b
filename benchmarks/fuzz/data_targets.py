"""The parsers of the pipelines: what lies beside shards, in caches, in tars and in patterns."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import numpy as np

from benchmarks.fuzz import samples
from benchmarks.fuzz.changes import (
    change_bytes,
    change_json,
    change_lines,
    change_words,
)
from benchmarks.fuzz.target import Change, Target
from fastmoco_pipelines.errors import ImageRefusedError, LabelError, ShardError
from fastmoco_pipelines.files.whole import SEAL, sealed_json
from fastmoco_pipelines.formats.headers import plain_image
from fastmoco_pipelines.formats.images import image_kind, read_header
from fastmoco_pipelines.formats.index import index_path, json_path
from fastmoco_pipelines.formats.index_file import HEAD_BYTES, IndexFile, to_bytes
from fastmoco_pipelines.formats.index_json import json_content
from fastmoco_pipelines.formats.labels import Found, LabelRule, number_labels, read_labels
from fastmoco_pipelines.formats.manifest import (
    HIDDEN,
    MOVING,
    NAME,
    FolderOfShards,
    check_folders,
    own_sets,
    read_moving,
    read_sets,
)
from fastmoco_pipelines.formats.members import TarSample
from fastmoco_pipelines.formats.paths import parse_list, to_list
from fastmoco_pipelines.formats.quarantine import Quarantine, QuarantineEntry, read_list
from fastmoco_pipelines.formats.tar import TarMember
from fastmoco_pipelines.inspecting.progress_file import FORMAT, VERSION, ProgressFile
from fastmoco_pipelines.inspecting.report import Fault, TarResult
from fastmoco_pipelines.making import folder_cache
from fastmoco_pipelines.sets import host_table
from fastmoco_pipelines.sets.patterns import (
    expand_braces,
    is_remote,
    local_names,
    sets_of,
    spells_out,
)
from fastmoco_pipelines.sets.records import SHARD
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.stores.cache import ShardCache
from fastmoco_pipelines.text import redact, shard_name, split_url, without_user


def _plain(change: Callable[[Random, bytes], bytes]) -> Change:
    return lambda rng, data, _: change(rng, data)


def _json_or_bytes(rng: Random, data: bytes, seeds: list[bytes]) -> bytes:
    return change_json(rng, data) if rng.random() < 0.8 else change_bytes(rng, data, seeds)


def _sealed(rng: Random, line: bytes) -> bytes:
    """Change a sealed JSON, mostly with a right seal."""
    plain = line.rpartition(SEAL)[0] + b"}"
    changed = change_json(rng, plain)
    if rng.random() < 0.2 or not changed.endswith(b"}"):
        return changed
    with suppress(ValueError, RecursionError):
        return sealed_json(json.loads(changed))
    digest = hashlib.sha256(changed).hexdigest().encode()
    return changed[:-1] + SEAL + digest + b'"}'


# Indexes whose hashes are all right.


def _change_forged(rng: Random, data: bytes, seeds: list[bytes]) -> bytes:
    if data.startswith(b"{"):
        return _sealed(rng, data)
    size = int.from_bytes(data[12:16], "little")
    header = json.loads(data[48 : 48 + size])
    first = -(-(48 + size) // 64) * 64
    sections = {
        name: data[first + start : first + start + length]
        for name, (start, length, _) in header["sections"].items()
    }
    name = rng.choice(list(sections))
    if name == "skipped" and rng.random() < 0.7:
        sections[name] = change_json(rng, sections[name])
    elif rng.random() < 0.8:
        sections[name] = change_bytes(rng, sections[name], seeds)
    start = 0
    for key, content in sections.items():
        header["sections"][key] = [start, len(content), hashlib.sha256(content).hexdigest()]
        start += -(-len(content) // 64) * 64
    if rng.random() < 0.5:  # the account of the records fits them
        whole = sections["records"][: len(sections["records"]) // 24 * 24]
        rows = np.frombuffer(whole, dtype="<i8,<u4,<u4,<i4,<u2,<u2")
        packed = np.zeros(len(rows), dtype="<u4,<u4,<i4,<u2,<u2")
        for to, of in zip(packed.dtype.names or (), ("f2", "f1", "f3", "f4", "f5"), strict=True):
            packed[to] = rows[of]
        header["content"] = hashlib.sha256(packed.tobytes()).hexdigest()
        header["unlabelled"] = int((rows["f3"] < 0).sum())
        header["samples"] = len(rows)
    text = json.dumps(header, separators=(",", ":")).encode()
    if rng.random() < 0.4:
        text = change_json(rng, text)
    head = data[:12] + len(text).to_bytes(4, "little") + hashlib.sha256(text).digest() + text
    parts = [head]
    for content in sections.values():
        parts += [bytes(-sum(map(len, parts)) % 64), content]
    return b"".join(parts)


def _read_forged(folder: Path, data: bytes, _: bytes) -> str:
    path = folder / "x.tar"
    path.write_bytes(samples.tars()[0])
    (json_path(path) if data[:1] == b"{" else index_path(path)).write_bytes(data)
    if data[:1] != b"{":
        file = IndexFile("x.tar.index", data)
        file.check(paths=True)
        file.whole(), file.skipped(), file.paths()
        IndexFile("x.tar.index", data[: HEAD_BYTES + 1])
    with ShardSet.open(str(path)) as shards:
        shards.read(np.arange(min(len(shards), 64)))
    return "accepted"


def _forged_seeds() -> list[bytes]:
    indexes = (samples.indexes()[0], samples.indexes()[-1])
    return [form for i in indexes for form in (to_bytes(i), sealed_json(json_content(i)))]


# Manifests.


def _manifests() -> list[bytes]:
    shards = [
        {"name": "x.tar", "samples": 3, "bytes": 20480, "sha256": "0" * 64},
        {"name": "y.tar", "samples": 4, "bytes": 20480, "sha256": "1" * 64},
    ]
    entry = {
        "samples": 7,
        "classes": ["cat", "dög"],
        "class_counts": [3, 4],
        "shards": shards,
        "skipped": [["a/b.gif", "a reason"]],
        "options": {"seed": 0, "max_side": None},
    }
    test = {**entry, "samples": 3, "class_counts": [1, 2], "shards": shards[:1], "skipped": []}
    sets = {"train": entry, "test": test}
    return [samples.compact({"format": "fastmoco-manifest", "version": 1, "sets": sets})]


def _read_manifest(folder: Path, data: bytes, _: bytes) -> str:
    (folder / NAME).write_bytes(data)
    for name in ("x.tar", "y.tar"):
        (folder / name).touch()
    sets = read_sets(folder)
    own_sets(folder)
    found = FolderOfShards(
        where=str(folder),
        sets=sets,
        samples={"x.tar": 3, "y.tar": 4},
        present=lambda name: os.path.lexists(folder / name),
    )
    check_folders([found])
    return "accepted"


def _movings() -> list[bytes]:
    entry = json.loads(_manifests()[0])["sets"]["train"]
    content = {"set": "train", "entry": entry, "folder": f"{HIDDEN}train", "old": ["x.tar"]}
    return [samples.compact(content)]


def _read_moving(folder: Path, data: bytes, _: bytes) -> str:
    (folder / MOVING).write_bytes(data)
    return "left aside" if read_moving(folder) is None else "accepted"


# Lists of bad samples, and the progress of a check.


def _entries() -> list[QuarantineEntry]:
    list_of = Quarantine()
    for number in range(4):
        list_of.add(
            shard="x.tar",
            key=f"00{number}",
            extension="jpg",
            offset=512 * number,
            size=900,
            crc32=7,
            reason="it cannot be decoded",
            when="2026-11-22T01:55:00Z",
            file=f"cat/ü{number}.jpg" if number % 2 else "",
        )
    return list(list_of)


def _quarantines() -> list[bytes]:
    def made(folder: Path) -> bytes:
        return Quarantine(_entries()).write(folder / "q.jsonl").read_bytes()

    return [samples.in_folder(made)]


def _read_quarantine(folder: Path, data: bytes, _: bytes) -> str:
    path = folder / "quarantine.jsonl"
    path.write_bytes(data)
    found, broken = read_list(path)
    found.rows("x.tar", [0, 512], [900, 900], [7, 7])
    found.write(path)
    return "accepted in part" if broken else "accepted"


_TERMS = {"shards": "x-*.tar", "decode": True, "versions": {"fastmoco": "1"}}


def _progresses() -> list[bytes]:
    fault = Fault.of("x.tar", "000.jpg", "damaged image", "a reason", offset=512)
    lines = [{"format": FORMAT, "version": VERSION, "terms": _TERMS}]
    for i in range(3):
        entry = replace(_entries()[0], shard=f"x-{i}.tar")
        result = TarResult(promised=3, delivered=2, quarantined=1, faults=[fault], entries=[entry])
        state = {"bytes": 20480, "mtime": 1}
        lines.append({"tar": f"x-{i}.tar", "state": state, "result": asdict(result)})
    return [b"".join(sealed_json(line) + b"\n" for line in lines)]


def _read_progress(folder: Path, data: bytes, _: bytes) -> str:
    path = folder / "check-progress-0.jsonl"
    path.write_bytes(data)
    said: list[str] = []
    progress = ProgressFile([path], _TERMS, resume=True, tell=said.append)
    known = progress.known
    progress.add("x-9.tar", {"bytes": 1}, TarResult())
    progress.finish()
    return f"{len(known)} of 3 tars taken over"


# Caches.


def _packed_folders() -> list[bytes]:
    state = folder_cache.FolderState(
        path="/photos", images=9, total_bytes=90, classes=("cat", "dog"), digest="0" * 64
    )
    options = folder_cache.PackOptions(max_side=64, holdout=0.1, classes=("cat", "dog"))
    content = {"format": folder_cache.FORMAT, "version": folder_cache.VERSION}
    content |= {"state": asdict(state), "options": asdict(options)}
    content |= {"samples": 8, "held_out": 1, "total_bytes": 90}
    return [samples.compact(content)]


def _read_packed(folder: Path, data: bytes, _: bytes) -> str:
    (folder / folder_cache.NAME).write_bytes(data)
    found = folder_cache.read_packed(folder)
    if found is None:
        return "made again"
    named = folder_cache.packed_name(found.state, found.options)
    return "accepted" if f"{found.pattern}{found.test_pattern}{named}" else ""


def _host_tables() -> list[bytes]:
    def made(folder: Path) -> bytes:
        rows = np.zeros(5, dtype=SHARD)
        rows["samples"] = 3
        path = folder / "a.set"
        host_table._store(path, host_table.OpenedSet(rows, ("cat", "dög")))
        return path.read_bytes()

    return [samples.in_folder(made)]


def _change_hashed(rng: Random, data: bytes, seeds: list[bytes]) -> bytes:
    """A hash in front of the content, mostly made right."""
    content = data.partition(b"\n")[2]
    if rng.random() < 0.2:
        return change_bytes(rng, data, seeds)
    head, mark, rest = content.partition(b"\n")
    changed = (
        change_json(rng, head) + mark + rest
        if rng.random() < 0.5
        else change_bytes(rng, content, seeds)
    )
    return hashlib.sha256(changed).hexdigest().encode() + b"\n" + changed


def _read_host_table(folder: Path, data: bytes, _: bytes) -> str:
    path = folder / "a.set"
    path.write_bytes(data)
    found = host_table._load(path, 5)
    return "read again" if found is None else f"accepted, {len(found.shards[:9])} shards"


_KEY = "a" * 64


def _documents() -> list[bytes]:
    def made(folder: Path) -> bytes:
        cache = ShardCache(folder, 1 << 20)
        cache.write_document(_KEY, '"etag-1"', to_bytes(samples.indexes()[0]))
        return (folder / f"{_KEY}.doc").read_bytes()

    return [samples.in_folder(made)]


def _read_document(folder: Path, data: bytes, sound: bytes) -> str:
    (folder / f"{_KEY}.doc").write_bytes(data)
    (folder / f"{_KEY}.from").write_bytes(data[:1500])
    (folder / f"{_KEY}.20480.part").write_bytes(data)
    cache = ShardCache(folder, 1 << 20)
    validator, content = cache.read_document(_KEY)
    cache.map_document(_KEY)
    part = cache.claim(_KEY, 20480)
    if part is not None:
        part.resume_point()
        part.close()
    if content and data.split(b"\n", 1)[-1] != sound.split(b"\n", 1)[-1]:
        return "VIOLATION: another content"
    return "accepted" if validator or content else "fetched again"


# Members of tars.


def _labels() -> list[bytes]:
    texts = [b"7", b"cat\n", b"3.0", b"-1", b'{"label": 3, "x": [1]}', b'{"label": "d\xc3\xb6g"}']
    return [*texts, b"\xff\xfec\0a\0t\0", b"a caption of several words\nand lines"]


def _read_labels(folder: Path, data: bytes, _: bytes) -> str:
    path = folder / "x.tar"
    path.write_bytes(data)
    rules = (LabelRule(), LabelRule(source="json"), LabelRule(source="cls"))
    given: list[tuple[Found, LabelRule]] = []
    with path.open("rb") as file:
        for source in ("cls", "json", "txt"):
            member = TarMember(f"a/0.{source}", "", 0, len(data))
            sample = TarSample(key="a/0", texts={source: member})
            given += [(read_labels(file.fileno(), sample, rule), rule) for rule in rules]
    for found, rule in given:
        numbered = number_labels([[found]], rule)
        if not all(-1 <= label < 2**31 for tar in numbered.labels for label in tar):
            return "VIOLATION: a label that fits no index"
    number_labels([[found for found, _ in given]], LabelRule())
    return "accepted"


def _read_header(_: Path, data: bytes, __: bytes) -> str:
    image_kind(data)
    header = read_header(data)
    plain_image(data)
    return f"accepted, {header.height}x{header.width}" if header.height > 999 else "accepted"


def _lists() -> list[bytes]:
    return [to_list([("000", "cat/ü.jpg"), ("001", "b\udcff.png"), ("002", "c d/e.png")])]


def _read_list(_: Path, data: bytes, __: bytes) -> str:
    return "left aside" if parse_list(data) is None else "accepted"


# Patterns and URLs.

_SECRET = "s3cr3t"  # noqa: S105 - must be shown nowhere


def _patterns() -> list[bytes]:
    found = [
        "train-*.tar",
        "train-{000000..000099}.tar",
        "{a,b}/x-*.tar",
        "file:///data/x.tar",
        f"https://user:{_SECRET}@host:8443/a/train-{{0..9}}.tar?token={_SECRET}",
        f"{{s3://bucket/a.tar,https://user:{_SECRET}@host/b.tar}}",
        "gs://bucket/a?b#c.tar",
        "x[0-9].tar",
        "~/shards/x.tar",
    ]
    return [text.encode() for text in found]


def _read_pattern(folder: Path, data: bytes, _: bytes) -> str:
    pattern = data.decode("utf-8", "surrogateescape").replace("\0", "")
    shown = redact(pattern)
    if not shown.isprintable() and "://" in pattern and "://" in shown:
        return f"VIOLATION: a URL is shown with control characters: {shown!a}"
    split_url(pattern), shard_name(pattern), without_user(pattern)
    # The words of refusals are judged too.
    try:
        if is_remote(pattern):
            expand_braces(pattern, pattern)
        else:
            inside = f"{folder}/{pattern.lstrip('/')}" if "/" in pattern else pattern
            os.chdir(folder)
            (folder / "train-000000.tar").touch()
            spells_out(inside), sets_of(inside)
            local_names(inside)
    except ValueError as error:
        # The password where a password is due; a copy of it in a path is a name like others.
        whole = re.match(r"https?://[\w.~-]*:" + _SECRET + r"@[\w.]+[:/]", pattern)
        once = pattern.partition("?")[0].count(_SECRET) == 1
        if whole and once and f":{_SECRET}@" in str(error):
            return f"VIOLATION: a secret is shown: {error!a}"
        raise
    return "accepted"


def targets() -> dict[str, Target]:
    """The targets of this module."""
    shard = (ShardError,)

    def lines(change: Callable[[Random, bytes], bytes] = change_json) -> Change:
        return lambda rng, data, _: change_lines(rng, data, change)

    def words(rng: Random, data: bytes, seeds: list[bytes]) -> bytes:
        return change_words(rng, data) if rng.random() < 0.2 else change_bytes(rng, data, seeds)

    def one(share: float, seeds, change, read, refusals=()) -> Target:  # type: ignore[no-untyped-def]
        return Target(share=share, seeds=seeds, change=change, read=read, refusals=refusals)

    return {
        "forged index": one(0.08, _forged_seeds, _change_forged, _read_forged, shard),
        "manifest": one(0.06, _manifests, _json_or_bytes, _read_manifest, shard),
        "moving": one(0.02, _movings, _json_or_bytes, _read_moving),
        "quarantine": one(0.05, _quarantines, lines(), _read_quarantine),
        "progress": one(0.04, _progresses, lines(_sealed), _read_progress),
        "packed folder": one(0.03, _packed_folders, _json_or_bytes, _read_packed),
        "host table": one(0.02, _host_tables, _change_hashed, _read_host_table),
        "cached document": one(0.03, _documents, _change_hashed, _read_document),
        "label": one(0.04, _labels, words, _read_labels, (LabelError,)),
        "image header": one(
            0.08,
            lambda: list(samples.images()),
            lambda rng, data, seeds: change_bytes(rng, data, seeds),
            _read_header,
            (ImageRefusedError,),
        ),
        "list of paths": one(0.01, _lists, _plain(change_bytes), _read_list),
        "pattern": one(0.04, _patterns, words, _read_pattern, (ValueError, ShardError)),
    }
