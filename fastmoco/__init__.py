"""fastmoco: train MoCo v3.

The command line is `fastmoco`; the classes behind it are imported from their modules:
`fastmoco.config.Config`, `fastmoco.recipes`, `fastmoco.training.trainer.Trainer`, `fastmoco.objectives.MoCoV3`.
"""

__version__ = "0.1.0"
