"""The child process of `fastmoco data check`: decodes images one by one.

Damaged bytes may crash a decoder, corrupt its heap, or make it take gigabytes. Here that ends a
disposable process with limits of the operating system; each answer is written before the next
image is read.

The protocol is JSON lines: first `{"memory_bytes": ..., "cpu_seconds": ...}` in,
`{"ready": true}` out; then lists of [path, offset, size, crc32 or null] in, and one object for
each of them out.

Started as `python -P -m fastmoco_pipelines.views.decode_child`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import ImageRefusedError
from fastmoco_pipelines.formats.images import MAX_BYTES, decodable, read_header, refusal_kind
from fastmoco_pipelines.processes import follow_parent
from fastmoco_pipelines.views.decoding import decode_image
from fastmoco_pipelines.views.graph import decode
from fastmoco_pipelines.views.runtime import build_pipeline, cause_of, has_dali

_FILE_BYTES = 1 << 20  # what a decoder may write to standard error
_NOISE = re.compile(r"\x1b\[[0-9;]*m|\[(?:ERROR|WARN|INFO)\]\s*|\[[a-z_]*decoder[a-z_]*\]\s*")
# libjpeg warns of these and continues with grey or garbage; its other warnings do not change
# pixels.
_GARBLED = re.compile(
    r"(Corrupt JPEG data: (premature end|bad Huffman|found marker)|Premature end of JPEG file).*"
)


class Decoder:
    """The decoder that the loader uses, fed as the loader feeds it, one image at a time."""

    def __init__(self) -> None:
        self._pipeline: Any = None  # of DALI

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The decoded image, [height, width, 3] uint8; valid until the next call.

        Raises:
            StructureError: if the file must not go to a decoder.
            RuntimeError: DALI's, of several types, if it gives up; without DALI, DecodeError.
        """
        plain, _ = decodable(data)
        if not has_dali():
            return decode_image(plain)
        if self._pipeline is None:
            options = {
                "batch_size": 1,
                "num_threads": 1,
                "device_id": None,
                "prefetch_queue_depth": 1,
                # In this thread: handing each image on to others costs more than it gains here.
                "exec_async": False,
                "exec_pipelined": False,
            }
            self._pipeline = build_pipeline(lambda: decode("cpu"), **options)
        pipeline, self._pipeline = self._pipeline, None  # void after an error
        pipeline.feed_input("encoded", [np.frombuffer(plain, np.uint8)])
        (images,) = pipeline.run()
        self._pipeline = pipeline
        pixels: NDArray[np.uint8] = images.at(0)
        return pixels


def main() -> int:
    """Answer until the other side closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    said = os.memfd_create("stderr", os.MFD_CLOEXEC)
    os.dup2(said, 2)
    os.dup2(said, 1)  # whatever a library prints must not be taken for an answer
    limits = json.loads(sys.stdin.buffer.readline())
    try:
        decoder = Decoder()
        decoder.decode(_warm_up())
    except Exception as error:  # The parent process reports why nothing can be decoded.
        answers.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}) + "\n")
        return 1
    limit_memory(limits["memory_bytes"])
    answers.write('{"ready": true}\n')
    for line in sys.stdin.buffer:
        for path, offset, size, crc32 in json.loads(line):
            limit_time(limits["cpu_seconds"])
            os.ftruncate(said, 0)
            os.lseek(said, 0, os.SEEK_SET)
            answers.write(json.dumps(_examine(decoder, said, path, offset, size, crc32)) + "\n")
    return 0


def _examine(
    decoder: Decoder, said: int, path: str, offset: int, size: int, crc32: int | None
) -> dict[str, Any]:
    """`kind` is empty for a good image; `listed`: an index would list it."""
    try:
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), min(size, MAX_BYTES + 1), offset)
    except OSError as error:  # no fault of the image, which must not be blamed for a crash
        what = f"cannot be read ({error.strerror})"
        known = {"crc32": crc32, "listed": True, "shape": None}
        return known | {"kind": "unreadable", "reason": what}
    answer: dict[str, Any] = {
        "crc32": zlib.crc32(data),
        "listed": False,
        "shape": None,
        "kind": "",
        "reason": "",
    }
    if len(data) < min(size, MAX_BYTES + 1):
        return answer | {"kind": "cut off", "reason": "the tar ends inside it"}
    if crc32 is not None and answer["crc32"] != crc32:
        return answer | {
            "kind": "changed bytes",
            "reason": "its bytes differ from the index (crc32)",
        }
    try:
        header = read_header(data)
    except ImageRefusedError as refused:
        return answer | {"kind": refusal_kind(data), "reason": str(refused)}
    answer |= {"listed": True, "shape": [header.height, header.width]}
    try:
        shape = decoder.decode(data).shape[:2]
    except Exception as error:  # DALI raises several types
        return answer | {
            "kind": "damaged image",
            "reason": f"it cannot be decoded ({_words(said, error)})",
        }
    if shape != (header.height, header.width):
        what = (
            f"it decodes to {shape[1]}x{shape[0]} pixels, its header declares "
            f"{header.width}x{header.height}"
        )
        return answer | {"kind": "damaged image", "reason": what}
    if complaint := _GARBLED.search(_printed(said)):
        return answer | {
            "kind": "garbled image",
            "reason": f"part of it decodes to nonsense ({complaint[0].strip()})",
        }
    return answer


def _printed(said: int) -> str:
    return _NOISE.sub("", os.pread(said, 4096, 0).decode("utf-8", "replace")).strip()


def _words(said: int, error: Exception) -> str:
    """What the decoder printed, or else the cause in DALI's error."""
    printed = _printed(said)
    words = printed.splitlines()[0] if printed else cause_of(error)
    return words.strip()[:300]


def _warm_up() -> bytes:
    """A small JPEG: libraries must be loaded before memory is limited."""
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    return out.getvalue()


def limit_memory(extra_bytes: int, *, file_bytes: int = _FILE_BYTES) -> None:
    """Limit memory beyond what is in use now, and the files that are written; no core files."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_time(seconds: int) -> None:
    """The operating system ends this process if its parent cannot."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, hard))


if __name__ == "__main__":
    follow_parent()
    sys.exit(main())
