"""Config of the images: where they are stored, how they become views, and kNN on them."""

from __future__ import annotations

import math
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
    """Where the images are stored and how they become views."""

    shards: Annotated[str, Resume.FREE] = ""
    """Training shards of `fastmoco data pack`: a path, glob, brace pattern or folder, or a URL with
    https://, http://, s3:// or gs://."""
    images: Annotated[str, Resume.FREE] = ""
    """A folder of images, one folder per class or only images, in place of `shards`. It is packed
    once, beside the run; a run that continues keeps the images it began with."""
    max_side: Annotated[int, Resume.FREE] = 0
    """Pixels to which the longer side of larger images is shrunk when `images` is packed; 0: 16/7
    of the view size (512 for views of 224). Shards are not changed."""
    view1: Annotated[ViewSpec, Resume.WITH_ALLOW] = field(
        default_factory=lambda: moco_v3_views()[0]
    )
    """Augmentation of the first view; `copies` above 1 makes several such views."""
    view2: Annotated[ViewSpec, Resume.WITH_ALLOW] = field(
        default_factory=lambda: moco_v3_views()[1]
    )
    """Augmentation of the second view, of the same size as the first; `copies` 0 omits it."""
    more_views: Annotated[tuple[ViewSpec, ...], Resume.WITH_ALLOW] = ()
    """Further groups of views after these two, e.g. the small crops of multi-crop."""
    device: Literal["auto"] | Device = "auto"
    """Where DALI decodes and augments; `auto` follows the training device."""
    threads: Annotated[int, Resume.FREE] = 0
    """DALI worker threads per process; 0 divides the machine's cores among its processes."""
    view_dtype: Annotated[Literal["auto", "float32", "uint8"], Resume.FREE] = "auto"
    """Data type of the views until the step uses them: `float32`, normalised, or `uint8`, levels,
    which take a quarter of the memory and from which the step computes the same numbers. `auto`:
    `uint8` if the model is on a GPU."""
    synthetic: bool = False
    """Train on one constant random batch instead of images, to find the highest throughput."""

    def __post_init__(self) -> None:
        LoaderOptions.__post_init__(self)
        require(
            self.device in ("auto", "cpu", "gpu"), "device", self.device, "must be auto, cpu or gpu"
        )
        require(self.threads >= 0, "threads", self.threads, "must not be negative")
        require(self.max_side >= 0, "max_side", self.max_side, "must not be negative")
        rule = f"cannot be given together with data.shards={self.shards!r}; give one of the two"
        require(not (self.images and self.shards), "images", self.images, rule)
        types = ("auto", "float32", "uint8")
        require(self.view_dtype in types, "view_dtype", self.view_dtype, f"must be one of {types}")

        # Rules across views.
        rule = "a batch needs the first view; to omit the second view, set view2.copies to 0"
        require(self.view1.copies >= 1, "view1.copies", self.view1.copies, rule)
        same = self.view1.size == self.view2.size or self.view2.copies == 0
        rule = f"both views must have the same size; view1.size={self.view1.size}"
        require(same, "view2.size", self.view2.size, rule)
        require_views(self.views, "view1, view2 and more_views")

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """All groups of views, in the order of a batch."""
        return (self.view1, self.view2, *self.more_views)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnConfig:
    """kNN accuracy of the encoder's features, measured during training."""

    train_shards: str = ""
    """Labelled shards of the kNN bank; empty: the training shards."""
    test_shards: str = ""
    """Held-out labelled shards to classify; empty: no kNN in training."""
    images: str = ""
    """In place of `test_shards`: a folder of held-out images, one folder per class, whose names are
    those of the training images. It is packed once, beside the run."""
    holdout: str = ""
    """In place of `test_shards`: share of each class of `data.images` that is held out, e.g. 10% or
    0.1; drawn by the seed of the run."""
    every_epochs: float = 5
    """Epochs between two measurements. The encoder is also measured before the first and after the
    last step. 0: never."""
    k: int = 20
    """Number of neighbours that vote."""
    temperature: float = 0.07
    """The vote of a neighbour has the weight exp(cosine / temperature)."""
    resize: int = 0
    """Shorter side of an evaluation image before its centre crop. 0: 256/224 of the image size if
    that is above 64 pixels, else the image size."""
    max_train_images: int = 50_000
    """Largest number of images in the bank during training; 0: all."""
    max_test_images: int = 10_000
    """Largest number of images to classify during training; 0: all."""
    max_share: float = 0.1
    """A measurement is postponed while kNN has taken more than this share of the run's time."""

    def __post_init__(self) -> None:
        names = ("test_shards", "images", "holdout")
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        for name in list(given)[1:]:
            rule = f"cannot be given together with knn.{next(iter(given))}; give one of them"
            require(False, name, given[name], rule)
        rule = "must be a share between 0 and 1, e.g. 10% or 0.1"
        require(0 <= self.holdout_share < 1, "holdout", self.holdout, rule)
        require(self.every_epochs >= 0, "every_epochs", self.every_epochs, "must not be negative")
        require(self.k >= 1, "k", self.k, "must be at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        for name in ("resize", "max_train_images", "max_test_images"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(0 < self.max_share <= 1, "max_share", self.max_share, "must be in (0, 1]")

    @property
    def holdout_share(self) -> float:
        """`holdout` as a number; -1 if it is none."""
        text = self.holdout.strip()
        try:
            share = float(text.removesuffix("%") or 0) / (100 if text.endswith("%") else 1)
        except ValueError:
            return -1
        return share if math.isfinite(share) else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyConfig:
    """Accuracy of a run that learns classes, on held-out images, measured during training."""

    test_shards: str = ""
    """Held-out labelled shards; empty: `knn.test_shards`, so that `knn.images` and `knn.holdout`
    give them too."""
    every_epochs: float = 1
    """Epochs between two measurements. The model is also measured before the first and after the
    last step. 0: never."""
    max_images: int = 0
    """Largest number of images to classify, spread evenly over the set; 0: all."""
    max_share: float = 0.2
    """A measurement is postponed while they have taken more than this share of the run's time."""

    def __post_init__(self) -> None:
        require(self.every_epochs >= 0, "every_epochs", self.every_epochs, "must not be negative")
        require(self.max_images >= 0, "max_images", self.max_images, "must not be negative")
        require(0 < self.max_share <= 1, "max_share", self.max_share, "must be in (0, 1]")
