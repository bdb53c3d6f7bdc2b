"""fastmoco: train MoCo v3.

The command line is `fastmoco`. Import classes from their modules, such as `fastmoco.config.Config`,
`fastmoco.training.trainer.Trainer` and `fastmoco.objectives.MoCoV3`. README.md in this folder is
the map of the package.
"""

import sys

# `python -m fastmoco` looks into the current folder first, where somebody's `typing.py` may be.
if sys.argv[:1] == ["-m"] and "fastmoco" in sys.orig_argv and not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))

import fastmoco_pipelines  # noqa: F401 (before torch: it sets how long OpenMP's threads spin)

__version__ = "0.1.0"
