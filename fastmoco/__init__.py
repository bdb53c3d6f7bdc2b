"""fastmoco: train MoCo v3.

The command line is `fastmoco`. Import classes from their modules, such as `fastmoco.config.Config`,
`fastmoco.training.trainer.Trainer` and `fastmoco.objectives.MoCoV3`. README.md in this folder is
the map of the package.
"""

import fastmoco_pipelines  # noqa: F401 (before torch: it sets how long OpenMP's threads spin)

__version__ = "0.1.0"
