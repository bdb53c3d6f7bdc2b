"""The part of a config that is about images: where they lie, how they become views, what they are evaluated on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastmoco_pipelines.spec import (
    Device,
    LoaderOptions,
    Resume,
    ViewSpec,
    moco_v3_views,
    require,
    require_views,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(LoaderOptions):
    """Where the images are and how they become views."""

    shards: Annotated[str, Resume.FREE] = ""
    """Training shards of `fastmoco data pack`: path, glob, braces or folder, also behind https://, http://, s3:// or gs://."""
    view1: Annotated[ViewSpec, Resume.WITH_ALLOW] = field(default_factory=lambda: moco_v3_views()[0])
    """Augmentation of the first view; `copies` above 1 cuts several views alike."""
    view2: Annotated[ViewSpec, Resume.WITH_ALLOW] = field(default_factory=lambda: moco_v3_views()[1])
    """Augmentation of the second view, of the first one's size; `copies` 0 leaves it out."""
    more_views: Annotated[tuple[ViewSpec, ...], Resume.WITH_ALLOW] = ()
    """Further groups of views after these two, e.g. the small crops of multi-crop."""
    device: Literal["auto"] | Device = "auto"
    """Where DALI decodes and augments; ``auto`` follows the training device."""
    threads: Annotated[int, Resume.FREE] = 0
    """DALI worker threads of each process; 0 shares the machine's cores among its processes."""
    view_dtype: Annotated[Literal["auto", "float32", "uint8"], Resume.FREE] = "auto"
    """What views are until the step takes them: ``float32``, normalised, or ``uint8``, levels, of which the step makes the same
    numbers: a quarter of the memory. ``auto``: ``uint8`` where the model is on a GPU."""
    synthetic: bool = False
    """Train on one constant random batch instead of images: the upper bound of every throughput figure."""

    def __post_init__(self) -> None:
        LoaderOptions.__post_init__(self)
        require(self.device in ("auto", "cpu", "gpu"), "device", self.device, "must be auto, cpu or gpu")
        require(self.threads >= 0, "threads", self.threads, "must not be negative")
        types = ("auto", "float32", "uint8")
        require(self.view_dtype in types, "view_dtype", self.view_dtype, f"must be one of {types}")
        rule = "a batch needs the first view; to leave the second one out set view2.copies to 0"
        require(self.view1.copies >= 1, "view1.copies", self.view1.copies, rule)
        same = self.view1.size == self.view2.size or self.view2.copies == 0
        rule = f"both views must have one size; view1.size={self.view1.size}"
        require(same, "view2.size", self.view2.size, rule)
        require_views(self.views, "view1, view2 and more_views")

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """All groups of views, in the order of a batch."""
        return (self.view1, self.view2, *self.more_views)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnConfig:
    """Accuracy of a nearest-neighbour vote on the encoder's features, measured while training."""

    train_shards: str = ""
    """Labelled shards whose features vote; empty: the training shards."""
    test_shards: str = ""
    """Held-out labelled shards to classify; empty: no kNN while training."""
    every_epochs: float = 5
    """Epochs between two measurements; one is also made before the first and after the last step. 0: never."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """A neighbour's vote weighs exp(cosine / temperature)."""
    resize: int = 0
    """Shorter side of an evaluation image before its centre crop; 0: 256/224 of the image size above 64 pixels, else it."""
    max_train_images: int = 50_000
    """At most this many images vote while training; 0: all."""
    max_test_images: int = 10_000
    """At most this many images are classified while training; 0: all."""
    max_share: float = 0.1
    """Time budget: a measurement is put off while kNN has taken more than this share of the run so far."""

    def __post_init__(self) -> None:
        require(self.every_epochs >= 0, "every_epochs", self.every_epochs, "must not be negative")
        require(self.k >= 1, "k", self.k, "must be at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        for name in ("resize", "max_train_images", "max_test_images"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(0 < self.max_share <= 1, "max_share", self.max_share, "must lie in (0, 1]")
