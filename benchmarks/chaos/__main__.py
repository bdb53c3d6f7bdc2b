"""The command of the chaos run."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

import benchmarks.chaos
from benchmarks.chaos.plan import MODES, Story, stories
from benchmarks.chaos.privileges import as_a_user
from benchmarks.chaos.processes import preload
from benchmarks.chaos.report import table_of, write_table
from benchmarks.chaos.story import Told, play, undisturbed
from fastmoco_pipelines import pack_digits


def main(argv: Sequence[str] | None = None) -> int:
    """Play stories until enough events have happened; returns 1 if one did not end as it must."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=benchmarks.chaos.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--events", type=int, default=150, help="that take place, at least")
    parser.add_argument(
        "--budget", type=float, default=900.0, help="begin no story after so many s"
    )
    parser.add_argument("--modes", nargs="+", choices=[*MODES], default=[*MODES])
    parser.add_argument("--only", type=int, help="play the story of this event again, up to it")
    parser.add_argument("--out", type=Path, help="folder for the log, and stories that went wrong")
    parser.add_argument("--table", type=Path, help="write the counts into this page")
    options = parser.parse_args(argv)
    as_a_user()
    preload()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it has started ends with it
    began = time.monotonic()
    out = options.out
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        pack_digits(folder / "shards", seed=0)
        truths = {}
        told: list[Told] = []
        for story in _chosen(options.seed, options.only):
            events = sum(len(one.happened) for one in told)
            if events >= options.events or time.monotonic() - began > options.budget:
                break
            if story.mode not in options.modes:
                continue
            if story.mode not in truths:
                truths[story.mode] = undisturbed(story.mode, folder / story.mode, folder / "shards")
            place = folder / f"story-{story.number}"
            one = play(story, place, folder / "shards", truths[story.mode], last=options.only)
            told.append(one)
            _print(one, options.seed)
            if out is not None:
                _log(out / "events.jsonl", one, options.seed)
                if not one.good:
                    shutil.copytree(
                        place,
                        out / place.name,
                        symlinks=True,
                        ignore=shutil.ignore_patterns("data", "*.tar"),
                        ignore_dangling_symlinks=True,
                        dirs_exist_ok=True,
                        copy_function=_copied,
                    )
            shutil.rmtree(place, ignore_errors=True)
    table = table_of(told, options.seed, seconds=time.monotonic() - began)
    print(table)
    if options.table is not None:
        write_table(options.table, table)
    return 0 if told and all(one.good for one in told) else 1


def _chosen(seed: int, only: int | None) -> Iterable[Story]:
    if only is None:
        return stories(seed)
    before = takewhile(lambda story: story.events[0].number <= only, stories(seed))
    return [[*before][-1]]


def _copied(source: str, target: str) -> None:
    if Path(source).is_file() and Path(source).stat().st_size < 1 << 20:
        shutil.copy2(source, target)


def _print(told: Told, seed: int) -> None:
    """One line for each event, and one for the end of the story."""
    for one in told.happened:
        print(
            f"{one.event.number:4d}  {told.story.mode:4s}  {one.event} ({one.to}): {one.outcome}  "
            f"{one.seconds:.1f} s",
            flush=True,
        )
    end = "the same bits" if not (told.silent or told.stuck) else "NOT THE SAME"
    wrong = [*told.silent[:3], *told.tracebacks[:2], told.stuck[-400:]]
    print(
        f"story {told.story.number} of seed {seed}: {end}; {len(told.excused)} damaged rows, "
        f"{told.left} processes left, {told.hangs} hangs, {told.seconds:.0f} s"
        + "".join(f"\n      ! {text}" for text in wrong if text),
        flush=True,
    )


def _log(path: Path, told: Told, seed: int) -> None:
    with path.open("a") as file:
        for one in told.happened:
            line = {"seed": seed, "event": one.event.number, "mode": told.story.mode}
            line |= {"what": str(one.event), "to": one.to, "outcome": one.outcome}
            file.write(json.dumps(line | {"seconds": round(one.seconds, 2)}) + "\n")
        line = {"seed": seed, "story": told.story.number, "silent": told.silent}
        line |= {"excused": told.excused, "left": told.left, "hangs": told.hangs}
        line |= {"tracebacks": told.tracebacks, "stuck": told.stuck, "cures": told.cures}
        file.write(json.dumps(line | {"seconds": round(told.seconds, 2)}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
