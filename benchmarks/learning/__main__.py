"""Train again what the newest stored line of the learning benchmark has trained, and compare.

    python -m benchmarks.learning        # or: make learning

Only fastmoco is trained, with the options of the stored line, until the number of images at which
it is judged. kNN at a number of images hardly depends on the machine; CPU-seconds do, and are
printed only. The mean of the seeds must not be lower than the stored mean by more than the spread
of the stored seeds.

Exit code 0: every task that could be compared has passed. 1: one has failed. 2: none could be
compared, and the reasons say what to install.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases.learning import DEFAULTS, run
from benchmarks.learning.curves import at_images, judge

STORED = Path(__file__).resolve().parents[1] / "results" / "learning.jsonl"
SUBJECT = "fastmoco"


def newest(path: Path) -> dict[str, Any]:
    """The last line of a file of results.

    Raises:
        SystemExit: if there is none, with the command that makes it.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        print(
            f"learning: {path} has no line to compare with; make one by "
            f"python -m benchmarks run learning --out {path}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def compare(result: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Exit code and lines of a comparison.

    Args:
        result: of the case, now.
        stored: of the case, as the line has it.
    """
    code, judged, lines = 0, 0, []
    for name, before in stored["tasks"].items():
        now = result["tasks"].get(name)
        if now is None:
            lines.append(f"not compared: {result['skipped'][name]}")
            continue
        if now["source"] != before["source"]:
            lines.append(
                f"not compared: {name}: the source files are not those of the stored line "
                f"({now['source']}, {before['source']}); it may be another version of the package"
            )
            continue

        # The same number of images on both sides.
        at = before["sides"][SUBJECT]["by_images"]["images"]
        each = [
            [at_images(curve, at) for curve in found["sides"][SUBJECT]["curves"]]
            for found in (now, before)
        ]
        verdict = judge(*each)
        judged += 1
        code = code or int(not verdict.passed)
        lines.append(f"{name}, {len(each[0])} seeds, {at:,} images: {verdict}")
        rates = [f["sides"][SUBJECT]["images_per_cpu_s"]["mean"] for f in (now, before)]
        lines.append(f"  images per CPU-second: {rates[0]:,.0f}, stored {rates[1]:,.0f}")
        for run_name, events in now["unstable"].items():
            lines += [f"  unstable: {run_name}: {event}" for event in events]
    if not judged:
        lines.append("learning: nothing was compared")
    return (code if judged else 2), lines


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fashion", default=DEFAULTS["fashion"], help="folder of Fashion-MNIST")
    parser.add_argument("--photos", default=DEFAULTS["photos"], help="folder of photographs")
    parser.add_argument("--folder", default="", help="keeps sets and finished runs")
    parser.add_argument("--stored", type=Path, default=STORED, help="file of JSON lines")
    given = parser.parse_args(argv)
    line = newest(given.stored)
    options = {
        **DEFAULTS,
        **line["options"],
        "sides": SUBJECT,
        "budget_s": 0.0,
        "fashion": given.fashion,
        "photos": given.photos,
        "folder": given.folder,
    }
    code, lines = compare(run(options), line["result"])
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
