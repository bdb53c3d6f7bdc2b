"""fastmoco: train MoCo v3.

The command line is `fastmoco`. Import classes from their modules, such as `fastmoco.config.Config`,
`fastmoco.training.trainer.Trainer` and `fastmoco.objectives.MoCoV3`. README.md in this folder is
the map of the package.
"""

import os
import sys


def _current_folder_last() -> None:
    """`python -m fastmoco` looks into the current folder first, where somebody's `typing.py` may be,
    and so do both ways of starting by an empty or relative part of PYTHONPATH."""
    by_module = sys.argv[:1] == ["-m"] and "fastmoco" in sys.orig_argv
    if not by_module and os.path.basename(sys.argv[0] if sys.argv else "") != "fastmoco":
        return  # somebody's own program
    try:
        here = os.getcwd()
    except OSError:  # it is removed
        return
    if by_module and not sys.flags.safe_path:
        sys.path.append(sys.path.pop(0))
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here in sys.path and here not in named:
        sys.path[:] = [*(part for part in sys.path if part != here), here]


_current_folder_last()

import fastmoco_pipelines  # noqa: E402, F401 (before torch: it sets how long OpenMP's threads spin)

__version__ = "0.1.0"
