"""Does this machine's decoder work? Asked of a process of its own before training, because a wrong
pair of libraries crashes.

DALI brings its image codecs along, and some pairs of them with a driver or a GPU end the process on
ordinary photographs. On a GPU the loader therefore has eight JPEGs of every common kind made into
views by a child first, and compared with Pillow's.
"""

from __future__ import annotations

import argparse
import io
import subprocess
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmoco_pipelines.errors import DecoderBrokenError
from fastmoco_pipelines.processes import child_environment, follow_parent, python_command
from fastmoco_pipelines.spec import Device, EvalSpec
from fastmoco_pipelines.views.reference import reference_eval

LIMIT_LEVELS = 4.0
"""Mean distance from Pillow, in levels of 255, that a decoder may have; GPUs interpolate color in
another way."""
DEADLINE_SECONDS = 180.0
_SPEC = EvalSpec(size=48, resize=48)
_KINDS: tuple[tuple[str, dict[str, object]], ...] = (
    ("RGB", {"quality": 92}),
    ("RGB", {"quality": 75, "subsampling": 2}),
    ("RGB", {"quality": 95, "subsampling": 0}),
    ("RGB", {"quality": 60, "subsampling": 1}),
    ("RGB", {"quality": 85, "progressive": True}),
    ("RGB", {"quality": 85, "restart_marker_blocks": 4}),
    ("L", {"quality": 90}),
    ("L", {"quality": 90, "progressive": True}),
)


def sample_jpegs() -> list[NDArray[np.uint8]]:
    """Eight small JPEGs, each [bytes] uint8, smooth as photographs are: grey and color, four
    samplings, baseline and progressive, odd sizes."""
    rng = np.random.default_rng(0)
    files = []
    for number, (mode, options) in enumerate(_KINDS):
        coarse = Image.fromarray(rng.integers(70, 186, (7, 9, 3), dtype=np.uint8))
        image = coarse.resize(
            (97 + 16 * number, 75 + 7 * number), Image.Resampling.BICUBIC
        ).convert(mode)
        out = io.BytesIO()
        image.save(out, "JPEG", **options)
        files.append(np.frombuffer(out.getvalue(), dtype=np.uint8))
    return files


def require_working_decoder(
    device: Device,
    device_id: int | None,
    *,
    command: Sequence[str] | None = None,
    deadline_s: float = DEADLINE_SECONDS,
) -> None:
    """Try the decoder in a child process.

    Args:
        device: where the views will be made.
        device_id: index of the GPU.
        command: what to run instead of this module, for tests.
        deadline_s: seconds that the child may take.

    Raises:
        DecoderBrokenError: if it crashes, hangs, or makes other pixels than Pillow.
    """
    where = [f"--device={device}", f"--device-id={device_id or 0}"]
    child = list(command or python_command("fastmoco_pipelines.views.self_test", *where))
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter and our own module
            child,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
            env=child_environment(),
        )
    except subprocess.TimeoutExpired:
        said = f"did not end within {deadline_s:.0f} s"
    else:
        if done.returncode == 0:
            return
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        said = f"died of signal {-done.returncode}" if done.returncode < 0 else f"failed: {last}"
    raise DecoderBrokenError(
        f"DALI cannot decode ordinary JPEGs on this machine's {device}: a test of eight {said}. "
        "Reinstall the DALI that fits the driver (extra cuda13 or cuda12), or "
        "decode on the CPU: --data.device cpu"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Decode the eight and compare: the child's part. Ends with an error where they differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--device-id", type=int, default=0)
    chosen = parser.parse_args(arguments)
    from fastmoco_pipelines.views.dali import EvalPipeline

    files = sample_jpegs()
    on_gpu = chosen.device == "gpu"
    pipeline = EvalPipeline(
        _SPEC,
        batch_size=len(files),
        threads=1,
        device=chosen.device,
        device_id=chosen.device_id if on_gpu else None,
    )
    made = pipeline.run(files).cpu().numpy()
    for number, (data, view) in enumerate(zip(files, made, strict=True)):
        truth = reference_eval(Image.open(io.BytesIO(data.tobytes())), _SPEC)
        apart = float((np.abs(view - truth) * 255 * np.array(_SPEC.std)[:, None, None]).mean())
        if not apart <= LIMIT_LEVELS:
            raise SystemExit(
                f"JPEG {number} of {len(files)} {_KINDS[number]} is {apart:.1f} levels from "
                "Pillow's"
            )


if __name__ == "__main__":
    follow_parent()
    main()
