"""`fastmoco checkpoint verify|list|consolidate`: verify checkpoints, list them,
export one to a single file.
"""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from fastmoco.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REFUSED, no_checkpoint, one_line, show


def verify(path: Positional[Path]) -> int:
    """Read every byte of every checkpoint and verify it.

    Exit code 0: all are sound, 1: some are not, 2: there is none.

    Args:
        path: Folder of a run, or of one checkpoint.
    """
    from fastmoco.checkpoint import inspect_checkpoints

    with one_line(EXIT_REFUSED, OSError):
        found = inspect_checkpoints(path)
        # Every reader ignores unfinished saves, so they are no fault of the run; `list` shows them.
        found = [one for one in found if one.committed or one.path == path]
        if not found:
            raise no_checkpoint(path)
    for one in found:
        show(f"{one.path.name}: {one.fault or 'sound'}")
    return EXIT_FAILED if any(one.fault for one in found) else EXIT_FINISHED


def list_all(path: Positional[Path]) -> int:
    """Step, size, time, ranks, kNN accuracy and status of every checkpoint.

    Also of unfinished saves. Reads every byte.

    Args:
        path: Folder of a run, or of one checkpoint.
    """
    from fastmoco.checkpoint import inspect_checkpoints

    with one_line(EXIT_REFUSED, OSError):
        found = inspect_checkpoints(path)
        if not found:
            raise no_checkpoint(path)
    # `--best` takes the highest accuracy, of equal ones that of the earliest step.
    scored = [one for one in found if one.score is not None]
    best = max(scored, key=lambda one: one.score.value if one.score else 0.0, default=None)
    label = best.score.label if best is not None and best.score is not None else "kNN"
    print(f"{'step':>10} {'MB':>10} {'saved at':<20} {'ranks':>5} {label:>7}  status")
    for one in found:
        ranks = str(one.world_size or "?")
        value = f"{one.score.value:.1%}" if one.score is not None else "-"
        status = one.fault or ("sound, best" if one is best else "sound")
        show(
            f"{one.step:>10} {one.size / 1e6:>10.3f} {one.saved_at or '?':<20} {ranks:>5} "
            f"{value:>7}  {status}"
        )
    return EXIT_FINISHED


def consolidate(
    path: Positional[Path], *, out: Path, encoder: bool = False, best: bool = False
) -> int:
    """Write the tensors of a checkpoint, saved on any number of ranks, into one safetensors file.

    Args:
        path: Folder of a run, for its newest sound checkpoint, or of one checkpoint.
        out: The file to write; it must not exist.
        encoder: Write only the encoder that the run evaluates, without its projector: for DINO,
            EsViT and ExtreMA the momentum encoder, else the trained one; default the full state.
        best: The checkpoint with the highest kNN accuracy, in place of the newest.
    """
    from fastmoco.checkpoint import consolidate as write
    from fastmoco.checkpoint import find_checkpoint

    with one_line(EXIT_REFUSED, OSError):
        checkpoint = find_checkpoint(path, best=best)
        for skipped, reason in checkpoint.skipped:
            show(f"passed over {skipped.name}: {reason}")
        from fastmoco.models.encoder_file import encoder_header, evaluated_network, state_header

        network = evaluated_network(checkpoint)
        header = encoder_header(checkpoint) if encoder else state_header(checkpoint)
        count = write(checkpoint, out, encoder_only=encoder, network=network, header=header)
    show(f"wrote {count} tensors of step {checkpoint.step} to {out}")
    return EXIT_FINISHED
