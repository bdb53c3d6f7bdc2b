"""The command line, for tests that also run where its parser is not installed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def main(words: Sequence[str]) -> int:
    """`fastmoco.cli.main.main`; the test that calls it is skipped where tyro is
    absent, as on a bare GPU machine.
    """
    pytest.importorskip("tyro", reason="tyro is not installed")
    from fastmoco.cli.main import main as run

    return run(list(words))
