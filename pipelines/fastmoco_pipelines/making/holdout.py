"""Which images of a folder are held out for kNN: a share of each class, drawn by a seed.

The draw of an image depends on its name and the seed alone, so that images that are added later
leave the others where they are. Files with the same bytes are always in the same part, because a
held-out image that the encoder was trained on would count as a success that means nothing.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from fastmoco_pipelines.files.whole import hash_file
from fastmoco_pipelines.making.sources import Source


def held_out_names(sources: Sequence[Source], *, share: float, seed: int) -> frozenset[str]:
    """The names of the images that are held out: of each class the share, rounded, and at least
    one of two images or more.

    Args:
        sources: images with labels.
        share: of each class, above 0 and below 1.
        seed: of the draw.
    """
    sizes: dict[int, int] = defaultdict(int)
    groups: dict[int, list[list[Source]]] = defaultdict(list)
    for group in same_bytes(sources):
        groups[group[0].label].append(group)
    for source in sources:
        sizes[source.label] += 1
    chosen: list[str] = []
    for label, candidates in groups.items():
        wanted = max(1, round(share * sizes[label])) if sizes[label] > 1 else 0
        taken = 0
        for group in sorted(candidates, key=lambda group: _draw(group[0].name, seed)):
            if taken + len(group) <= wanted and taken + len(group) < sizes[label]:
                chosen += [source.name for source in group]
                taken += len(group)
    return frozenset(chosen)


def same_bytes(sources: Sequence[Source]) -> list[list[Source]]:
    """The images in groups of equal content, each in the order given, by their first one.

    Only files of equal size are read.
    """
    by_size: dict[int, list[Source]] = defaultdict(list)
    for source in sources:
        by_size[_size(source)].append(source)
    first: dict[tuple[int, str], Source] = {}
    group_of: dict[str, list[Source]] = {}
    for source in sources:
        size = _size(source)
        key = (size, "" if len(by_size[size]) == 1 else _hash(source))
        leader = first.setdefault(key, source)
        group_of.setdefault(leader.name, []).append(source)
    return list(group_of.values())


def also_in(sources: Sequence[Source], others: Iterable[Source]) -> frozenset[str]:
    """The names of the images whose bytes are also those of one of the others. Only files of equal
    size are read."""
    by_size: dict[int, list[Source]] = defaultdict(list)
    for other in others:
        by_size[_size(other)].append(other)
    hashes = {
        size: frozenset(map(_hash, by_size[size]))
        for size in {_size(source) for source in sources} & by_size.keys()
    }
    return frozenset(
        source.name
        for source in sources
        if (known := hashes.get(_size(source))) is not None and _hash(source) in known
    )


def _draw(name: str, seed: int) -> bytes:
    """A number between images, as bytes that sort."""
    return hashlib.sha256(f"{seed}/".encode() + name.encode("utf-8", "surrogateescape")).digest()


def _size(source: Source) -> int:
    try:
        return source.path.stat().st_size
    except OSError:
        return -1


def _hash(source: Source) -> str:
    """Of the content; a file that cannot be read, and so is not packed, equals no other one."""
    try:
        return hash_file(source.path)
    except OSError:
        return source.name
