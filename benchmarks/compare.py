"""A case of two commits, each run by its own code in a throw-away worktree, a round of each in turn.

A worktree is removed at the end, also after an error or an interrupt. The tree at hand is not
touched, and its uncommitted changes are not measured.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from benchmarks.case import Case
from benchmarks.measure import ratios
from benchmarks.outcome import FAILED, MARKED, SKIPPED, outcome
from benchmarks.shown import figures

ROOT = Path(__file__).resolve().parents[1]
NATIVE = "kernels/fastmoco_kernels/cut_views"
LIMIT_S = 3600


def compare(
    commits: Sequence[str],
    cases: Sequence[Case],
    *,
    rounds: int,
    quick: bool,
    settings: Sequence[str] = (),
    root: Path = ROOT,
) -> int:
    """Run cases of two commits in turn, and print the ratios of their figures.

    Args:
        commits: two names that git knows.
        cases: to compare; their quick options apply to both commits.
        rounds: runs of each commit.
        quick: the quick form.
        settings: `name=value`s of the only case.
        root: of the source checkout.

    Returns:
        0 if every gate of both commits passed.

    Raises:
        SystemExit: outside of a checkout, or for an unknown commit.
    """
    if not (root / ".git").exists() or shutil.which("git") is None:
        raise SystemExit(
            f"benchmarks: {root} is no git checkout, or git is absent: clone the repository"
        )
    hashes = [_commit(root, name) for name in commits]
    if changed := _git(root, "status", "--porcelain", "--untracked-files=no"):
        count = len(changed.splitlines())
        print(f"the tree has {count} changed files: they are not measured, {commits} are")
    print(f"A = {commits[0]} ({hashes[0][:9]}), B = {commits[1]} ({hashes[1][:9]})")
    failed = False
    with worktree(root, hashes[0]) as a, worktree(root, hashes[1]) as b:
        trees = {"A": (a, hashes[0]), "B": (b, hashes[1])}
        known = {side: _options_of(*tree) for side, tree in trees.items()}
        for case in cases:
            absent = [side for side in trees if case.name not in known[side]]
            if absent:
                print(f"{case.name}: not in {' nor '.join(absent)}", flush=True)
                continue
            given = {name: str(value) for name, value in case.quick.items()} if quick else {}
            given |= dict(word.split("=", 1) for word in settings)
            found: dict[str, list[dict[str, Any]]] = {"A": [], "B": []}
            reason = ""
            for number in range(rounds):
                for side in ("A", "B") if number % 2 == 0 else ("B", "A"):
                    if reason:
                        break
                    words = [f"{n}={v}" for n, v in given.items() if n in known[side][case.name]]
                    status, why, result = _run(*trees[side], case.name, words)
                    if status in (FAILED, MARKED, SKIPPED):
                        reason = f"{side} {status}: {why}"
                        failed = failed or status != SKIPPED
                    found[side].append(result)
            print(f"{case.name}: {reason}" if reason else table(case.name, found), flush=True)
    return int(failed)


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """A commit in a temporary folder, with the C part; removed at the end, also by SIGTERM."""
    before = signal.signal(signal.SIGTERM, _ended)
    folder = Path(tempfile.mkdtemp(prefix="fastmoco-compare-"))
    tree = folder / "tree"
    try:
        _git(root, "-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach", tree, commit)
        _add_native(root, tree)
        yield tree
    finally:
        subprocess.run(
            ["git", "-C", str(root), "worktree", "remove", "--force", str(tree)],
            capture_output=True,
            check=False,
        )
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def _ended(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _add_native(root: Path, tree: Path) -> None:
    """The compiled C part: copied if its sources are the same in both trees, else built."""
    sources = sorted((tree / NATIVE / "native").glob("*.[ch]"))
    if not sources:
        return
    here = [root / source.relative_to(tree) for source in sources]
    built = list((root / NATIVE).glob("_native*.so"))
    same = all(
        b.exists() and a.read_bytes() == b.read_bytes() for a, b in zip(sources, here, strict=True)
    )
    if built and same and (root / "setup.py").read_bytes() == (tree / "setup.py").read_bytes():
        shutil.copy(built[0], tree / NATIVE)
        return
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not list((tree / NATIVE).glob("_native*.so")):
        print(f"the C part of {tree.parent.name} was not built: {done.stderr.strip()[-200:]}")


def _run(tree: Path, commit: str, name: str, words: list[str]) -> tuple[str, str, dict[str, Any]]:
    """Outcome, reason and result of a case of a worktree, with the CPU-seconds of the process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "line.jsonl"
        before = _children()
        done = _benchmarks(tree, commit, "run", name, *words, "--out", str(out))
        spent = _children() - before
        if not out.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return FAILED, last[:300], {}
        result = json.loads(out.read_text().splitlines()[-1])["result"]
    return *outcome(result), {"cpu_s of the whole case": spent, **result}


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _benchmarks(tree: Path, commit: str, *words: str) -> subprocess.CompletedProcess[str]:
    paths = (tree, tree / "kernels", tree / "pipelines")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "FASTMOCO_COMMIT": commit,
    }
    command = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(
        command,
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )


def _options_of(tree: Path, commit: str) -> dict[str, set[str]]:
    """The cases of a worktree and the names of their options, as its `list` prints them."""
    done = _benchmarks(tree, commit, "list")
    if done.returncode:
        raise SystemExit(f"benchmarks: {commit[:9]} lists no cases: {done.stderr.strip()[-300:]}")
    found: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith(" "):
            options = {word.partition("=")[0] for word in line.split() if "=" in word}
            found[list(found)[-1]] |= options
        elif ":" in line:
            found[line.partition(":")[0]] = set()
    return found


def table(name: str, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Ratios of the figures that differ between runs; the rest is constant."""
    by_side = {side: [dict(figures(result)) for result in each] for side, each in found.items()}
    shared = [key for key in by_side["A"][0] if all(key in r for s in by_side.values() for r in s)]
    rows = []
    for key in shared:
        a, b = ([run[key] for run in by_side[side]] for side in ("A", "B"))
        if len({*a, *b}) == 1 or min(a) <= 0:
            continue
        ratio = ratios(b, a)
        rows.append((key, ratio["median"], ratio["q20"], ratio["q80"]))
    width = max([len(row[0]) for row in rows], default=0)
    lines = [f"{name}: B / A over {len(found['A'])} rounds: median (q20 to q80)"]
    lines += [f"  {key:{width}}  {m:.3f} ({low:.3f} to {high:.3f})" for key, m, low, high in rows]
    alone = {s: {k for r in by_side[s] for k in r} - set(shared) for s in by_side}
    lines += [f"  only in {s}: {', '.join(sorted(k))}" for s, k in alone.items() if k]
    return "\n".join(lines)


def _commit(root: Path, name: str) -> str:
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except subprocess.CalledProcessError:
        raise SystemExit(f"benchmarks: git knows no commit {name!r} in {root}") from None


def _git(root: Path, *words: object) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *map(str, words)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
