"""What is learned: which encoder sees which view, which loss compares them, and when the twin moves."""

from fastmoco.objectives.moco_v3 import MoCoV3, MoCoV3Output

__all__ = ["MoCoV3", "MoCoV3Output"]
