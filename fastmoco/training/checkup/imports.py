"""Imports one module in a process of its own, without torch: `python -m fastmoco.training.checkup.imports
MODULE`. It may crash or hang."""

from __future__ import annotations

import importlib
import sys

from fastmoco.training.checkup.findings import MARK
from fastmoco_pipelines.processes import follow_parent

if __name__ == "__main__":
    follow_parent()
    importlib.import_module(sys.argv[1])
    print(f"\n{MARK}[]", flush=True)
