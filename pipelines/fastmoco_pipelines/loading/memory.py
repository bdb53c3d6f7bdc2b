"""What a training loader holds on its device, by arithmetic, so that a plan of a step can leave it
room. Inert: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fastmoco_pipelines.spec import LoaderSpec, ViewSpec, require

IMAGE_BYTES = 500 * 400 * 3
"""Assumed decoded image: ImageNet's is 0.18 million pixels in the mean."""
ENCODED_BYTES = 110_000
"""Assumed image file: ImageNet's mean."""
MARGIN = 1.5
"""On DALI's buffers: a run of larger images, and pools that keep more than is in use."""
DECODER_BYTES = 4 << 20
"""The decoder's buffer for each thread, as views.graph.GPU_DECODER asks for."""
RESIZE_IMAGES = 32
"""Images that DALI's resize keeps a float32 intermediate of at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderBytes:
    """What a loader holds at its peak on the device where it makes the views, in bytes.

    Attributes:
        batch_bytes: all views of one local batch; one such batch is in use by the trainer.
        ready_bytes: the batches ahead of it, ready or being made.
        scratch_bytes: memory to make one of them: DALI's buffers for one run, and those of the
            color kernels.
    """

    batch_bytes: int
    ready_bytes: int
    scratch_bytes: int

    @property
    def beside_batch_bytes(self) -> int:
        """All but the batch that is in use."""
        return self.ready_bytes + self.scratch_bytes

    @property
    def peak_bytes(self) -> int:
        """All of it."""
        return self.batch_bytes + self.beside_batch_bytes


def loader_bytes(spec: LoaderSpec, world_size: int = 1) -> LoaderBytes:
    """Memory of one rank's loader on its device: GPU memory for `spec.device="gpu"`, else host
    memory.

    Args:
        spec: of the loader.
        world_size: processes that share each global batch.

    Raises:
        ValueError: for a batch that the ranks cannot share equally.
    """
    size = spec.global_batch_size
    views = spec.each_view
    require(world_size >= 1, "world_size", world_size, "needs at least one rank")
    require(
        size % world_size == 0, "global_batch_size", size, f"must be a multiple of {world_size=}"
    )
    local = size // world_size
    run = spec.images_per_run(local)
    level_bytes = 1 if spec.view_dtype == "uint8" else 4
    levels = [3 * view.size**2 for view in views]
    batch = local * sum(levels) * level_bytes
    on_gpu = spec.device == "gpu"
    ahead = spec.batches_ahead + (0 if on_gpu else 1)
    # what is copied into its rows of the batch
    parts = run * sum(levels) * level_bytes if run < local else 0
    if on_gpu:
        dali = run * (ENCODED_BYTES + IMAGE_BYTES) + sum(_cut_bytes(view, run) for view in views)
        color = max(_color_bytes(view, run) for view in views)
        # Large images fill the budget, whatever the usual ones take.
        scratch = max(int(MARGIN * dali), spec.decode_bytes)
        scratch += color + parts + spec.threads * DECODER_BYTES
    else:
        images = min(run * IMAGE_BYTES, spec.decode_bytes)
        scratch = int(MARGIN * (run * ENCODED_BYTES + images)) + parts
    return LoaderBytes(batch_bytes=batch, ready_bytes=ahead * batch, scratch_bytes=scratch)


def _cut_bytes(view: ViewSpec, run: int) -> int:
    """DALI's own for a view on a GPU: windows, the resize's intermediate, and the resized levels,
    or a chain of colors."""
    share = sum(view.crop_scale) / 2
    window = int(IMAGE_BYTES * share)
    intermediate = min(run, RESIZE_IMAGES) * int((window / 3) ** 0.5) * view.size * 3 * 4
    levels = 3 * view.size**2
    # of a chain an operation's input and output, the grey's and a split's
    steps = 1 if view.color == "exact" else 4
    return run * (window + steps * levels) + intermediate


def _color_bytes(view: ViewSpec, run: int) -> int:
    """Of the kernels of `color="exact"` on a GPU: planes to blur, and the blur's two buffers."""
    return 3 * run * 3 * view.size**2 if view.color == "exact" and view.blur_probability > 0 else 0
