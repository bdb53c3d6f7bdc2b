"""Comparing two commits: in worktrees that are removed, by the code of each, a run of each in turn."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from benchmarks import compare as module
from benchmarks.compare import compare, table, worktree
from benchmarks.registry import CASES

PROGRAM = """
import json, os, sys
if sys.argv[1] == "list":
    print("ema: An average.\\n    rounds=7 device=auto")
    sys.exit()
assert os.environ["PYTHONPATH"].startswith(os.getcwd())
options = sys.argv[3:-2]
out = {"speedup": {"slow": {"median": SPEED}}, "subject": "ours", "failed": FAILED,
       "errors": {"ours": 1.0}, "given": len(options)}
with open(sys.argv[-1], "a") as file:
    file.write(json.dumps({"result": out}) + "\\n")
"""


def _git(root, *words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
        ["git", "-C", str(root), *identity, *words], check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.fixture
def repository(tmp_path):
    """Two commits whose only case differs by a factor of two; a third fails its gate."""
    root = tmp_path / "repository"
    (root / "benchmarks").mkdir(parents=True)
    _git(root, "init", "-q")
    for tag, speed, failed in (("one", 1.0, "{}"), ("two", 2.0, "{}"), ("bad", 9.0, '{"ours": 1}')):
        text = PROGRAM.replace("SPEED", str(speed)).replace("FAILED", failed)
        (root / "benchmarks" / "__main__.py").write_text(text)
        _git(root, "add", "-A")
        _git(root, "commit", "-q", "-m", tag)
        _git(root, "tag", tag)
    return root


def _trees(root):
    return _git(root, "worktree", "list").splitlines()


def test_each_commit_runs_by_its_own_code_and_leaves_nothing(repository, capsys):
    (repository / "benchmarks" / "__main__.py").write_text("raise SystemExit('not committed')")
    before = _git(repository, "status", "--porcelain")
    cases = [CASES["ema"], CASES["knn"]]
    assert compare(["one", "two"], cases, rounds=2, quick=True, root=repository) == 0
    printed = capsys.readouterr().out
    assert "1 changed files: they are not measured" in printed
    assert "speedup.slow" in printed
    assert "2.000 (2.000 to 2.000)" in printed
    assert "errors" not in printed
    assert "knn: not in A nor B" in printed
    assert _git(repository, "status", "--porcelain") == before
    assert len(_trees(repository)) == 1


def test_a_failed_gate_has_no_ratio(repository, capsys):
    cases = [CASES["ema"]]
    assert compare(["one", "bad"], cases, rounds=2, quick=True, root=repository) == 1
    printed = capsys.readouterr().out
    assert "ema: B failed: ours: 1" in printed
    assert "speedup" not in printed


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_worktree_is_removed_whatever_happens(repository, error):
    made = []

    def fail():
        with worktree(repository, "one") as tree:
            made.append((tree, (tree / "benchmarks" / "__main__.py").exists()))
            made.append(_trees(repository))
            raise error

    with pytest.raises(error):
        fail()
    (tree, existed), trees = made
    assert existed
    assert not tree.exists()
    assert (len(trees), len(_trees(repository))) == (2, 1)


def test_what_cannot_be_compared_is_refused(repository, tmp_path):
    case = replace(CASES["ema"], quick={})
    with pytest.raises(SystemExit, match="git knows no commit 'three'"):
        compare(["one", "three"], [case], rounds=1, quick=True, root=repository)
    with pytest.raises(SystemExit, match="is no git checkout"):
        compare(["one", "two"], [case], rounds=1, quick=True, root=tmp_path)


def test_constant_figures_and_those_of_one_side_are_not_ratios():
    found = {"A": [{"ms": 1.0, "rows": 5, "old": 1.0}], "B": [{"ms": 3.0, "rows": 5, "new": 1.0}]}
    text = table("case", found)
    assert "ms  3.000" in text
    assert "rows" not in text
    assert "only in A: old" in text
    assert "only in B: new" in text


def test_the_c_part_is_copied_where_its_sources_are_the_same(tmp_path):
    trees = [tmp_path / name for name in ("here", "there")]
    for tree in trees:
        (tree / module.NATIVE / "native").mkdir(parents=True)
        (tree / module.NATIVE / "native" / "cut.c").write_text("int one;")
        (tree / "setup.py").write_text("raise SystemExit('no compiler')")
    (trees[0] / module.NATIVE / "_native.abi3.so").write_text("built")
    module._add_native(*trees)
    assert (trees[1] / module.NATIVE / "_native.abi3.so").read_text() == "built"


def test_the_c_part_is_not_copied_where_its_sources_differ(tmp_path, capsys):
    trees = [tmp_path / name for name in ("here", "there")]
    for tree in trees:
        (tree / module.NATIVE / "native").mkdir(parents=True)
        (tree / module.NATIVE / "native" / "cut.c").write_text(f"int {tree.name};")
        (tree / "setup.py").write_text("raise SystemExit('no compiler')")
    (trees[0] / module.NATIVE / "_native.abi3.so").write_text("built")
    module._add_native(*trees)
    assert not (trees[1] / module.NATIVE / "_native.abi3.so").exists()
    assert "no compiler" in capsys.readouterr().out
