"""What is learned: which encoder sees which view, which loss compares them, what is averaged."""

from fastmoco.objectives.interface import Objective, Output
from fastmoco.objectives.moco_v3 import MoCoV3

__all__ = ["MoCoV3", "Objective", "Output"]
