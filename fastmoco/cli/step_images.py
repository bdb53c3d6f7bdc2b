"""`fastmoco run images`: which images were in a step of a run."""

from __future__ import annotations

import json as json_module
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from fastmoco.cli.output import until_closed
from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, one_line, say, show

if TYPE_CHECKING:
    from fastmoco.training.step_images import RunImages, StepImages

A_ROW = 16
"""Images of a row of a picture."""


def images(
    run: Positional[Path],
    *,
    step: tuple[int, ...] = (),
    rank: int | None = None,
    shards: str = "",
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Which images were in a step of a run; without --step, the steps with a gradient spike.

    The images follow from the run's seed, the step and the lists of bad images: no image is read.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`.
        step: Steps, as metrics.jsonl and the console count them, from 1.
        rank: Only the images of this rank; default all ranks.
        shards: The training set, if it has moved since.
        out: Draw the images of one step too, with their file names.
        json: Print JSON instead of text.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError), until_closed():
        if out is not None and len(step) != 1:
            raise ValueError(f"out={str(out)!r}: shows one step: give one with --step")
        if not step:
            return _spikes(run, json)
        from contextlib import closing

        from fastmoco.training.step_images import RunImages

        with closing(RunImages(run, shards)) as source:
            found = [source.of_step(number, rank) for number in step]
            for note in source.notes:
                say(note)
            done = source.steps_done()
            if max(step) > done:
                say(
                    f"step {max(step)} is not trained yet ({done} are): a bad image that is not in "
                    "a list yet would be replaced"
                )
            if json:
                steps = [_to_json(source, one) for one in found]
                print(json_module.dumps({"run": str(run), "steps": steps}, indent=1))
            else:
                for one in found:
                    _print(source, one)
            if out is not None:
                _draw(source, found[0], out, quiet=json)
    return EXIT_FINISHED


def _spikes(run: Path, as_json: bool) -> int:
    """Print the steps with a spike."""
    from fastmoco.errors import RunError
    from fastmoco.run.folder import RunFolder
    from fastmoco.run.metrics_file import read_spikes

    metrics = RunFolder(run).metrics
    if not metrics.exists():
        raise RunError(
            f"{run} contains no metrics.jsonl; is it the folder given to fastmoco train --out?"
        )
    spikes = read_spikes(metrics, tell=say)
    if as_json:
        steps = [{"step": step, "gradient_norms": norms} for step, norms in spikes.items()]
        print(json_module.dumps({"run": str(run), "spikes": steps}, indent=1))
        return EXIT_FINISHED
    for step, norms in spikes.items():
        # A step without finite gradients is skipped (training/step_guard.py).
        skipped = "; skipped" if "total" in norms and norms["total"] is None else ""
        shown = (
            f"{place} {'not finite' if norm is None else f'{norm:.3g}'}"
            for place, norm in norms.items()
        )
        show(f"step {step}: gradient norm of {', '.join(shown)}{skipped}")
    if spikes:
        command = shlex.join(["fastmoco", "run", "images", str(run), "--step", str(min(spikes))])
        show(f"the images of a step: {command}")
    else:
        print("no step with a gradient spike is recorded")
    return EXIT_FINISHED


def _print(source: RunImages, found: StepImages) -> None:
    """One line for each image."""
    from fastmoco_pipelines.text import escaped

    count = sum(len(one.sample_ids) for one in found.ranks)
    ranks = f"{found.world_size} ranks" if found.world_size > 1 else "1 rank"
    only = f", rank {found.ranks[0].rank} alone" if len(found.ranks) < found.world_size else ""
    print(f"step {found.step}: {count} images, epoch {found.epoch:.2f}, {ranks}{only}")
    for one in found.ranks:
        paths = source.shards.paths_of(one.sample_ids)
        pairs = zip(one.sample_ids.tolist(), one.wanted_ids.tolist(), paths, strict=True)
        for sample, wanted, path in pairs:
            where = source.shards.describe(sample).partition(" (")[0]
            name = escaped(path)
            member = "" if where.endswith(f": {name}") else name
            line = f"rank {one.rank}  {sample:>9}  {member or where}"
            line += f"  ({where})" if member else ""
            if sample != wanted:
                bad = source.shards.describe(wanted)
                line += f"  in place of {bad}: {escaped(source.bad[wanted])}"
            elif sample in source.unreadable:
                line += f"  or another one: {escaped(source.unreadable[sample])}"
            show(line)


def _draw(source: RunImages, found: StepImages, out: Path, *, quiet: bool) -> None:
    """Draw the images of a step, some in a row."""
    import numpy as np

    from fastmoco_pipelines.inspecting.contact_sheet import save_contact_sheet

    sample_ids = np.concatenate([one.sample_ids for one in found.ranks])
    paths = source.shards.paths_of(sample_ids)
    data = source.shards.read(sample_ids)
    cells = [(one.tobytes(), [path]) for one, path in zip(data, paths, strict=True)]
    rows = [cells[start : start + A_ROW] for start in range(0, len(cells), A_ROW)]
    path = save_contact_sheet(rows, out)
    if not quiet:
        show(f"wrote {path}")


def _to_json(source: RunImages, found: StepImages) -> dict[str, Any]:
    """The images of a step as values of JSON."""
    from fastmoco_pipelines.formats.index_json import path_to_json

    images = []
    for one in found.ranks:
        paths = source.shards.paths_of(one.sample_ids)
        labels = source.shards.labels_of(one.sample_ids).tolist()
        rows = zip(one.sample_ids.tolist(), one.wanted_ids.tolist(), paths, labels, strict=True)
        for sample, wanted, path, label in rows:
            entry = source.shards.entry(sample)
            image: dict[str, Any] = {
                "rank": one.rank,
                "sample": sample,
                "path": path_to_json(path),
                "shard": entry["shard"],
                "member": f"{entry['key']}.{entry['extension']}",
                "label": label,
            }
            if sample != wanted:
                image["in_place_of"] = {"sample": wanted, "reason": source.bad[wanted]}
            elif sample in source.unreadable:
                image["unreadable"] = source.unreadable[sample]
            images.append(image)
    return {
        "step": found.step,
        "epoch": round(found.epoch, 6),
        "world_size": found.world_size,
        "images": images,
    }
