"""What a view is and what a loader delivers: inert, validated data. No torch, no DALI, nothing
random.

Equation and number source: Chen, Xie, He 2021 (MoCo v3), the asymmetric augmentation pair of BYOL.
Strengths follow torchvision's conventions: a strength s means a factor drawn uniformly from [1 - s,
1 + s]; hue is a share of a full turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from typing import Annotated, Literal

Device = Literal["cpu", "gpu"]
"""Where images are decoded and models are trained."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SWAV_STD = (0.228, 0.224, 0.225)
"""Deviations in the official code of SwAV, which has 0.228 where others have 0.229."""
MOST_SIDE = 16_384
"""Pixels of the side of a view or of an evaluation image at most."""
MOST_THREADS = 1024
"""Threads or processes of one kind on a machine at most: a library may end the process for more."""
MOST_BATCHES_AHEAD = 1024
MOST_VIEWS = 255
"""Views of an image at most: a view's number is one byte of the Philox counter of its draws."""
GPU_SUB_BATCH = 128
"""Images of one run of DALI on a GPU: enough for all of its JPEG engines, little enough for the
memory (memory.py)."""
DECODE_GB: dict[Device, float] = {"cpu": 2.0, "gpu": 0.4}
"""Size in 10^9 bytes of the images that are decoded in one run at most: 3,300 of ImageNet's, or 13
of the largest that are let in; on a GPU, where runs are small and windows count too, a fifth."""
SECONDS_PER_IMAGE = 30.0
"""Time that one image may take to decode: the largest that is let in takes a few seconds."""
MOST_SECONDS = 1_000_000
"""Of a time limit: eleven days. Waits of the system take little more."""
MOST_TRANSFERS = 256
"""Shards of a server that a process can be asked to fetch at once."""
MAX_TRANSFERS = 32
"""Shards of a server that a process fetches ahead at once, at most."""


class Resume(Enum):
    """Whether a field of a run's config may differ when the run continues; a field without a mark
    may not.

    The mark is in the annotation: `threads: Annotated[int, Resume.FREE] = 0`. A mark on a group of
    fields holds for all of them.
    """

    FREE = "free"
    """It may: no batch and no step is computed from it, or the results agree to rounding."""
    WITH_ALLOW = "with --allow"
    """Where the user names it: it changes what is trained, but the state and the order of the
    images stay usable."""


class FieldError(ValueError):
    """A field has a value that it must not have.

    The text names the field by its path in the tree of configs as far as it is known where the rule
    was checked; `under` adds the first part where the tree is built.
    """

    def __init__(self, name: str, value: object, rule: str) -> None:
        super().__init__(f"{name}={value!r}: {rule}")
        self.name = name
        self.value = value
        self.rule = rule

    def __reduce__(self) -> tuple[type[FieldError], tuple[str, object, str]]:
        return type(self), (self.name, self.value, self.rule)

    def under(self, path: str) -> FieldError:
        """The same error of a field below `path`."""
        return FieldError(f"{path}.{self.name}" if path else self.name, self.value, self.rule)


@contextmanager
def under(path: str) -> Iterator[None]:
    """Fields that are refused inside are named below `path`.

    Raises:
        FieldError: with the whole path.
    """
    try:
        yield
    except FieldError as error:
        raise error.under(path) from error.__cause__


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise the one form of configuration error: which field, what it holds, what it must hold.

    Raises:
        FieldError: if `condition` is false.
    """
    if not condition:
        raise FieldError(name, value, rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """How one augmented view is cut from one decoded image. Order of operations: crop and resize,
    brightness, contrast about the image's grey mean, saturation, hue (these four in an order drawn
    for each image where `color="exact"`), greyscale, Gaussian blur, solarize, horizontal flip,
    normalise."""

    copies: int = 1
    """Views of this kind that are cut from each image, each with its own draws; 0: none."""
    size: int = 224
    """Output height and width in pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that the crop window covers (moco-v3: 0.08 for
    ViT, 0.2 for ResNet)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the crop window, drawn uniformly in the logarithm."""
    crop_misfit: Literal["retry", "clip"] = "retry"
    """What becomes of a drawn window that is higher or wider than the image. `retry`: another is
    drawn, ten in all, then the center is taken, as in torchvision. `clip`: the window is cut down to
    the image, as in MAE's linear probe."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    shares_crop: bool = False
    """Whether the crop window and the flip are those of the first view; color is drawn apart."""
    base_size: int = 0
    """Height and width in pixels to which the crop window is resized before the view is cut from
    it; 0: `size`, all of it is the view."""
    shift: int = 0
    """With `base_size`: the view begins up to so many rows and columns, drawn uniformly, from the
    upper left of the resized and flipped window."""
    jitter_probability: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed."""
    brightness: float = 0.4
    """Brightness strength."""
    contrast: float = 0.4
    """Contrast strength."""
    saturation: float = 0.2
    """Saturation strength."""
    hue: float = 0.1
    """Hue strength, in turns: 0.1 shifts by up to 36 degrees either way; at most 0.5."""
    grayscale_probability: float = 0.2
    """Probability that the view becomes grayscale."""
    blur_probability: float = 1.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in output pixels. Made for images of
    224: scale it with the size of the large views. Small crops have the same blur in pixels."""
    solarize_probability: float = 0.0
    """Probability that pixels at or above `solarize_threshold` are inverted."""
    solarize_threshold: int = 128
    """Level, 0 to 255, from which solarize inverts."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel mean subtracted after scaling to [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel standard deviation divided by."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of the resize, with antialiasing: `bilinear`, or `bicubic` as in DINO."""
    color: Literal["dali", "exact"] = "exact"
    """Implementation of the color operations. `exact`: bit-identical to torchvision's PIL
    transforms, in each image's own random order, by fused kernels on GPUs and compiled C on CPUs
    (there with crop and resize). `dali`: fixed order, hue approximated; see docs/views.md for the
    differences. Stored configs without this field mean `dali`."""

    def __post_init__(self) -> None:
        require(self.copies >= 0, "copies", self.copies, "counts views; 0 leaves them out")
        require(self.size >= 1, "size", self.size, "a view is at least 1 pixel wide")
        rule = f"a view is at most {MOST_SIDE:,} pixels wide"
        require(self.size <= MOST_SIDE, "size", self.size, rule)
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            "crop_scale",
            self.crop_scale,
            "needs 0 < smallest <= largest <= 1",
        )
        low, high = self.crop_ratio
        require(0 < low <= high, "crop_ratio", self.crop_ratio, "needs 0 < smallest <= largest")
        rule = 'is "retry" or "clip"'
        require(self.crop_misfit in ("retry", "clip"), "crop_misfit", self.crop_misfit, rule)
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            value = getattr(self, f"{name}_probability")
            require(0 <= value <= 1, f"{name}_probability", value, "a probability lies in [0, 1]")
        require(self.shift >= 0, "shift", self.shift, "counts pixels; 0 is the upper left")
        base, least = self.base_size, self.size + self.shift
        rule = f"holds no view of size={self.size} with shift={self.shift}: needs {least} pixels"
        require(base >= least or base == self.shift == 0, "base_size", base, rule)
        rule = f"a window is resized to at most {MOST_SIDE:,} pixels"
        require(base <= MOST_SIDE, "base_size", base, rule)
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "a strength lies in [0, 1]")
        require(0 <= self.hue <= 0.5, "hue", self.hue, "a hue strength lies in [0, 0.5] turns")
        low, high = self.blur_sigma
        require(
            0 < low <= high,
            "blur_sigma",
            self.blur_sigma,
            "needs 0 < smallest <= largest, in pixels",
        )
        require(
            0 <= self.solarize_threshold <= 255,
            "solarize_threshold",
            self.solarize_threshold,
            "a level is 0 to 255",
        )
        require(
            all(s > 0 for s in self.std), "std", self.std, "every channel's deviation is positive"
        )
        require(
            self.interpolation in ("bilinear", "bicubic"),
            "interpolation",
            self.interpolation,
            'is "bilinear" or "bicubic"',
        )
        require(self.color in ("dali", "exact"), "color", self.color, 'is "dali" or "exact"')


def moco_v3_views(
    size: int = 224, *, crop_min: float = 0.08, color: Literal["dali", "exact"] = "exact"
) -> tuple[ViewSpec, ViewSpec]:
    """The asymmetric pair of MoCo v3: view 1 is always blurred, view 2 rarely blurred and sometimes
    solarized.

    Args:
        size: output height and width in pixels. The blur, defined at 224, is scaled with it.
        crop_min: smallest share of the image's area a crop covers.
        color: implementation of the color operations.
    """
    first = ViewSpec(size=size, crop_scale=(crop_min, 1.0), blur_sigma=_sigma(size), color=color)
    return first, replace(first, blur_probability=0.1, solarize_probability=0.2)


def dino_views(
    size: int = 224,
    local_size: int = 96,
    local_copies: int = 8,
    *,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
    color: Literal["dali", "exact"] = "exact",
) -> tuple[ViewSpec, ...]:
    """The views of DINO (Caron et al. 2021): two large crops and several small ones, bicubic.

    The first large crop is always blurred, the second rarely, and sometimes solarized; a small one
    is blurred in one of two.

    Args:
        size: height and width of the large crops in pixels.
        local_size: height and width of the small crops in pixels.
        local_copies: number of small crops; 0: no group of them.
        global_scale: smallest and largest share of the image's area of a large crop.
        local_scale: smallest and largest share of a small crop.
        color: implementation of the color operations.

    Returns:
        Two groups of large crops, then the group of small ones: `data.view1`, `data.view2` and
        `data.more_views`. The blur is 0.1 to 2 pixels in large and small crops alike where `size`
        is 224, and is scaled with `size`.
    """
    first = ViewSpec(
        size=size,
        crop_scale=global_scale,
        blur_sigma=_sigma(size),
        interpolation="bicubic",
        color=color,
    )
    second = replace(first, blur_probability=0.1, solarize_probability=0.2)
    small = replace(
        first, copies=local_copies, size=local_size, crop_scale=local_scale, blur_probability=0.5
    )
    return (first, second, small) if local_copies else (first, second)


def swav_views(
    size: int = 224,
    local_size: int = 96,
    local_copies: int = 6,
    *,
    global_scale: tuple[float, float] = (0.14, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.14),
    color: Literal["dali", "exact"] = "exact",
) -> tuple[ViewSpec, ...]:
    """The views of SwAV (Caron et al. 2020): two large crops and several small ones, all with the
    same strong color and a blur in one of two.

    Args:
        size: height and width of the large crops in pixels.
        local_size: height and width of the small crops in pixels.
        local_copies: number of small crops; 0: no group of them.
        global_scale: smallest and largest share of the image's area of a large crop.
        local_scale: smallest and largest share of a small crop.
        color: implementation of the color operations.

    Returns:
        Two groups of large crops, then the group of small ones. The blur is that of `dino_views`.
        The channels are divided by the deviations of the official code, 0.228 for red.
    """
    large = ViewSpec(
        size=size,
        crop_scale=global_scale,
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        blur_probability=0.5,
        blur_sigma=_sigma(size),
        std=SWAV_STD,
        color=color,
    )
    small = replace(large, copies=local_copies, size=local_size, crop_scale=local_scale)
    return (large, large, small) if local_copies else (large, large)


def moco_v2_views(
    size: int = 224, *, crop_min: float = 0.2, color: Literal["dali", "exact"] = "exact"
) -> tuple[ViewSpec, ViewSpec]:
    """The views of MoCo v2 (Chen, Fan, Girshick, He 2020), both of one distribution: saturation
    0.4, and a blur in one of two.

    Args:
        size: output height and width in pixels. The blur, defined at 224, is scaled with it.
        crop_min: smallest share of the image's area a crop covers.
        color: implementation of the color operations.
    """
    view = ViewSpec(
        size=size,
        crop_scale=(crop_min, 1.0),
        saturation=0.4,
        blur_probability=0.5,
        blur_sigma=_sigma(size),
        color=color,
    )
    return view, view


def simsiam_views(
    size: int = 224, *, crop_min: float = 0.2, color: Literal["dali", "exact"] = "exact"
) -> tuple[ViewSpec, ViewSpec]:
    """The views of SimSiam (Chen, He 2021), which are those of MoCo v2; arguments as there."""
    return moco_v2_views(size, crop_min=crop_min, color=color)


def cmae_views(
    size: int = 224, *, crop_min: float = 0.2, color: Literal["dali", "exact"] = "exact"
) -> tuple[ViewSpec, ViewSpec]:
    """The views of CMAE (Huang et al. 2022), bicubic: both are cut from one crop of 256 pixels, the
    online encoder's from its upper left, without changes of color; the target's shifted by up to 31
    rows and columns, with color and a blur in one of two.

    Greyscale is the luma of ITU-R 601. The official code, read and not run, weighs red by the
    number for blue and blue by that for red.

    Args:
        size: output height and width in pixels. The crop, the shift and the blur, defined at 224,
            are scaled with it.
        crop_min: smallest share of the image's area a crop covers.
        color: implementation of the color operations.
    """
    online = ViewSpec(
        size=size,
        crop_scale=(crop_min, 1.0),
        base_size=size + round(32 * size / 224),
        jitter_probability=0.0,
        grayscale_probability=0.0,
        blur_probability=0.0,
        blur_sigma=_sigma(size),
        interpolation="bicubic",
        color=color,
    )
    target = replace(
        online,
        shares_crop=True,
        shift=round(31 * size / 224),
        jitter_probability=0.8,
        saturation=0.4,
        grayscale_probability=0.2,
        blur_probability=0.5,
    )
    return online, target


def extrema_views(
    size: int = 224, *, crop_min: float = 0.2, color: Literal["dali", "exact"] = "exact"
) -> tuple[ViewSpec, ViewSpec]:
    """The views of ExtreMA (Wu et al. 2022): one crop and flip with two draws of color, no blur.

    The resize is bicubic as in MAE, whose crop it is; that is a choice, the filter is not known.

    Args:
        size: output height and width in pixels.
        crop_min: smallest share of the image's area a crop covers.
        color: implementation of the color operations.
    """
    view = ViewSpec(
        size=size,
        crop_scale=(crop_min, 1.0),
        blur_probability=0.0,
        blur_sigma=_sigma(size),
        interpolation="bicubic",
        color=color,
    )
    return view, replace(view, shares_crop=True)


def moco_v1_views(
    size: int = 224, *, crop_min: float = 0.2, color: Literal["dali", "exact"] = "exact"
) -> tuple[ViewSpec, ViewSpec]:
    """The views of MoCo v1 (He et al. 2020), both of one distribution: the color always changes,
    with 0.4 of everything, and nothing is blurred.

    Greyscale comes after the jitter here, before it in the official code. A grey image, one of
    five, differs by that: its luma weighs channels that hue and saturation have moved.

    Args:
        size: output height and width in pixels.
        crop_min: smallest share of the image's area a crop covers.
        color: implementation of the color operations.
    """
    view = ViewSpec(
        size=size,
        crop_scale=(crop_min, 1.0),
        jitter_probability=1.0,
        saturation=0.4,
        hue=0.4,
        blur_probability=0.0,
        blur_sigma=_sigma(size),
        color=color,
    )
    return view, view


def _sigma(size: int) -> tuple[float, float]:
    """The blur of 0.1 to 2 pixels at size 224, scaled with the size of the large views."""
    return 0.1 * size / 224, 2.0 * size / 224


def each_view(groups: Sequence[ViewSpec]) -> tuple[ViewSpec, ...]:
    """The views of an image one by one, in the order of the groups: n copies become n views.

    View i of the result has the number i + 1 in the draws. Applied again it changes nothing.
    """
    views: list[ViewSpec] = []
    for group in groups:
        views += [group if group.copies == 1 else replace(group, copies=1)] * group.copies
    return tuple(views)


def require_views(groups: Sequence[ViewSpec], name: str) -> None:
    """Check that groups of views make a batch.

    Raises:
        ValueError: for no view or too many, where views of one size are not neighbours, or where a
            view shares a crop that it cannot share.
    """
    copies = tuple(group.copies for group in groups)
    rule = "copies of each group: there is no view, give one group a copy"
    require(sum(copies) >= 1, name, copies, rule)
    rule = f"copies of each group: at most {MOST_VIEWS} views in all, give fewer copies"
    require(sum(copies) <= MOST_VIEWS, name, copies, rule)

    sizes = tuple(group.size for group in groups if group.copies)
    changes = sum(size != before for before, size in pairwise(sizes))
    rule = (
        "sizes of the groups: those of one size must be neighbours, change the order of the groups"
    )
    require(changes == len(set(sizes)) - 1, name, sizes, rule)

    first, *others = (group for group in groups if group.copies)
    rule = "shares_crop of each group: the first view has its own crop, set it to false there"
    require(not first.shares_crop, name, tuple(group.shares_crop for group in groups), rule)
    for field_name in ("crop_scale", "crop_ratio", "crop_misfit", "flip_probability"):
        wanted = getattr(first, field_name)
        values = [getattr(group, field_name) for group in others if group.shares_crop]
        rule = f"{field_name} of the groups with shares_crop: must be the first view's, {wanted}"
        require(all(value == wanted for value in values), name, tuple(values), rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """Where shards of a server are kept on this machine; local shards need none."""

    cache_dir: Annotated[str, Resume.FREE] = ""
    """Folder for copies of shards from a server, for this user alone, shared by all processes of a
    machine; empty: fastmoco/shards in the user's cache folder (XDG_CACHE_HOME or ~/.cache)."""
    cache_size_gb: Annotated[float, Resume.FREE] = 100
    """Size of that folder in 10^9 bytes at most; a fifth of the free disk is left alone in any
    case."""

    def __post_init__(self) -> None:
        size = self.cache_size_gb
        require(0 < size < 1e9, "cache_size_gb", size, "a size in GB is above 0")

    @property
    def cache_bytes(self) -> int:
        """Size of the folder in bytes at most."""
        return int(self.cache_size_gb * 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions(CacheSpec):
    """How a training loader works: what its spec and the config of a run have in common."""

    prefetch: Annotated[int, Resume.FREE] = 0
    """Batches ahead of the trainer: on a CPU beside the one that is being made, on a GPU, where
    memory is short, that one counts. 0: two on a CPU, one on a GPU."""
    sub_batch: Annotated[int, Resume.FREE] = 0
    """Images that DALI decodes and augments in one run, which bounds its buffers. 0: the whole
    batch on a CPU, 128 on a GPU."""
    decode_gb: Annotated[float, Resume.FREE] = 0
    """Size in 10^9 bytes of the images that are decoded in one run: a batch above it is decoded in
    several, an image above it alone, and no bit changes. 0: 2 on a CPU, 0.4 on a GPU."""
    seconds_per_image: Annotated[float, Resume.FREE] = SECONDS_PER_IMAGE
    """Seconds that one image may take to decode; one that takes longer, in a process of its own
    too, is left out as a damaged one is."""
    shuffle_window: int | None = None
    """Shards shuffled together; 0: all. `none`: all of a local set, of a remote one 64, or as many as
    fit into half of the cache."""
    max_bad_share: Annotated[float, Resume.FREE] = 0.001
    """Share of the images that may prove bad before the run ends, or 10 images if that is more; 0:
    none. Those in the list beside the shards (`fastmoco data check`) do not count."""
    timeout_s: Annotated[float, Resume.FREE] = 600
    """Seconds to wait for one batch before the run ends, e.g. where a disk of the network hangs."""
    max_transfers: Annotated[int, Resume.FREE] = MAX_TRANSFERS
    """Shards of a server that one process fetches ahead at once, at most: as many of them as pay,
    by measurement."""

    def __post_init__(self) -> None:
        CacheSpec.__post_init__(self)
        require(
            self.prefetch >= 0,
            "prefetch",
            self.prefetch,
            "counts batches; 0 leaves it to the device",
        )
        ahead = self.prefetch
        rule = f"at most {MOST_BATCHES_AHEAD:,} batches are made ahead"
        require(ahead <= MOST_BATCHES_AHEAD, "prefetch", ahead, rule)
        require(
            self.sub_batch >= 0,
            "sub_batch",
            self.sub_batch,
            "counts images; 0 leaves it to the device",
        )
        require(
            0 <= self.decode_gb < 1e9,
            "decode_gb",
            self.decode_gb,
            "a size in GB; 0 leaves it to the device",
        )
        require(
            0 < self.seconds_per_image <= MOST_SECONDS,
            "seconds_per_image",
            self.seconds_per_image,
            f"needs a time above 0 and at most {MOST_SECONDS:,} seconds",
        )
        window = self.shuffle_window
        require(
            window is None or window >= 0,
            "shuffle_window",
            window,
            "counts shards; 0 shuffles the whole set",
        )
        require(
            0 <= self.max_bad_share <= 1,
            "max_bad_share",
            self.max_bad_share,
            "a share lies in [0, 1]",
        )
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "needs a time above 0 seconds")
        rule = f"a time limit has at most {MOST_SECONDS:,} seconds"
        require(self.timeout_s <= MOST_SECONDS, "timeout_s", self.timeout_s, rule)
        require(
            1 <= self.max_transfers <= MOST_TRANSFERS,
            "max_transfers",
            self.max_transfers,
            f"counts shards that are fetched at once, from 1 to {MOST_TRANSFERS}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSpec(LoaderOptions):
    """What a training loader delivers: which shards, which views, how many at a time, and where."""

    shards: str
    """Shard tars: a path, a glob (`train-*.tar`), a brace pattern (`train-{000000..000099}.tar`),
    or a folder; or a URL of these forms with `https://`, `http://`, `s3://` or `gs://`."""
    views: tuple[ViewSpec, ...] = field(default_factory=moco_v3_views)
    """Groups of views, each of `ViewSpec.copies` views. A batch holds the views of the first group,
    then those of the second, and so on. Groups of one size are neighbours."""
    global_batch_size: int
    """Images of one step over all ranks; every rank gets an equal part."""
    seed: int = 0
    """Seed of the order and of every augmentation draw."""
    device: Device = "cpu"
    """Where DALI decodes and augments."""
    threads: int = 2
    """DALI worker threads of this process."""
    view_dtype: Literal["float32", "uint8"] = "float32"
    """Type of the views: `float32`, normalised; or `uint8`, the levels 0 to 255 before that last
    step, a quarter of the bytes. `levels.normalise` makes the first of the second, to the bit."""
    classes: int = 0
    """Classes of the labels that batches carry; 0: they carry none."""

    def __post_init__(self) -> None:
        LoaderOptions.__post_init__(self)
        require(self.classes >= 0, "classes", self.classes, "counts classes; 0 asks for no labels")
        require(
            bool(self.shards.strip()),
            "shards",
            self.shards,
            "name the shard tars, e.g. data/train-*.tar",
        )
        require_views(self.views, "views")
        require(
            self.global_batch_size >= 2,
            "global_batch_size",
            self.global_batch_size,
            "needs at least 2 images",
        )
        require(
            0 <= self.seed < 2**63, "seed", self.seed, "needs a whole number from 0 to 2**63 - 1"
        )
        require(self.device in ("cpu", "gpu"), "device", self.device, 'is "cpu" or "gpu"')
        require(self.threads >= 1, "threads", self.threads, "needs at least one thread")
        rule = f"DALI has at most {MOST_THREADS:,} threads"
        require(self.threads <= MOST_THREADS, "threads", self.threads, rule)
        require(
            self.view_dtype in ("float32", "uint8"),
            "view_dtype",
            self.view_dtype,
            'is "float32" or "uint8"',
        )

    @property
    def each_view(self) -> tuple[ViewSpec, ...]:
        """How each view of a batch is made, in the order of `Batch.views`."""
        return each_view(self.views)

    @property
    def batches_ahead(self) -> int:
        """`prefetch`, resolved."""
        return self.prefetch or (1 if self.device == "gpu" else 2)

    @property
    def decode_bytes(self) -> int:
        """`decode_gb`, resolved, in bytes."""
        return int(1e9 * (self.decode_gb or DECODE_GB[self.device]))

    def images_per_run(self, local_batch_size: int) -> int:
        """`sub_batch`, resolved: images of one run of DALI, given the images of each batch on this
        process."""
        wanted = self.sub_batch or (GPU_SUB_BATCH if self.device == "gpu" else local_batch_size)
        return min(wanted, local_batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSpec:
    """How a held-out image is shown to the encoder: shorter side to `resize`, centre crop of
    `size`, normalise."""

    size: int = 224
    """Output height and width in pixels."""
    resize: int = 256
    """Length of the shorter side before the crop, in pixels; equal to `size` for images that small
    already."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel mean subtracted after scaling to [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel standard deviation divided by."""

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", self.size, "an image is at least 1 pixel wide")
        rule = f"the shorter side has at most {MOST_SIDE:,} pixels"
        require(self.resize <= MOST_SIDE, "resize", self.resize, rule)
        require(
            self.resize >= self.size,
            "resize",
            self.resize,
            f"the shorter side cannot be below size={self.size}",
        )
        require(
            all(s > 0 for s in self.std), "std", self.std, "every channel's deviation is positive"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalLoaderSpec(CacheSpec):
    """What an evaluation loader delivers: which shards, how they are shown, how many at a time, and
    where."""

    shards: str
    """The shards, as for `LoaderSpec`."""
    image: EvalSpec = field(default_factory=EvalSpec)
    """How an image is shown."""
    batch_size: int
    """Images of a batch on each rank; the last one may be smaller."""
    device: Device = "cpu"
    """Where DALI works."""
    threads: int = 2
    """DALI worker threads of this process."""
    limit: int | None = None
    """Use only this many images, spread evenly over the set; None uses all."""
    max_bad_share: float = 0.001
    """Share of the set's images that may prove bad, or 10 images if that is more; 0: none."""

    def __post_init__(self) -> None:
        CacheSpec.__post_init__(self)
        require(
            bool(self.shards.strip()),
            "shards",
            self.shards,
            "name the shard tars, e.g. data/test-*.tar",
        )
        require(self.batch_size >= 1, "batch_size", self.batch_size, "needs at least 1 image")
        require(self.device in ("cpu", "gpu"), "device", self.device, 'is "cpu" or "gpu"')
        require(self.threads >= 1, "threads", self.threads, "needs at least one thread")
        rule = f"DALI has at most {MOST_THREADS:,} threads"
        require(self.threads <= MOST_THREADS, "threads", self.threads, rule)
        require(
            self.limit is None or self.limit >= 1,
            "limit",
            self.limit,
            "needs at least 1 image, or None for all",
        )
        require(
            0 <= self.max_bad_share <= 1,
            "max_bad_share",
            self.max_bad_share,
            "a share lies in [0, 1]",
        )
