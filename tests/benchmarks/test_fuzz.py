"""The fuzz run: a small one breaks no rule, inputs repeat with their seed, and a violation is an
exit code."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks.fuzz import TARGETS, main, mutated, report, write_seeds


@pytest.mark.slow
def test_a_small_run_breaks_no_rule(capsys):
    assert main(["--inputs", "300", "--seed", "7", "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "300 inputs in" in text
    assert text.rstrip().endswith(" 0 violations")
    assert all(f"{target}: " in text for target in TARGETS)


def test_inputs_repeat_with_their_seed(tmp_path):
    seeds = write_seeds(tmp_path)
    first, again = (
        [mutated(rng, seeds) for _ in range(200)] for rng in map(np.random.default_rng, (3, 3))
    )
    assert first == again
    assert {target for target, _, _ in first} == set(TARGETS)
    changed = sum(data != seeds[target][number] for target, number, data in first)
    assert changed > 180


def test_a_violation_is_an_exit_code(capsys):
    assert (
        report({"image": Counter({("refused by its header", "x"): 3})}, restarts=0, seconds=1.0)
        == 0
    )
    for kind in ("VIOLATION: pixels differ from Pillow's", "crash", "hang"):
        assert report({"image": Counter({(kind, "x"): 1})}, restarts=1, seconds=1.0) == 1
    assert "1 violations" in capsys.readouterr().out
