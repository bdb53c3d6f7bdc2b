"""The pictures of a report, and tables that need more than the folder of the run. They are made
elsewhere; these are the forms in which the page takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastmoco.run.report.charts import FeatureMap


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A small picture.

    Attributes:
        source: data URI of a PNG or JPEG.
        alt: what it shows, for readers who do not see it.
        caption: a line below it; "" for none.
    """

    source: str
    alt: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows of pictures; or the reason why there are none."""

    rows: Sequence[Sequence[Tile]] = ()
    note: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts; or the reason why there is none."""

    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ""
    why: str = ""


LEFT_OUT = "Left out by --no-pictures."


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What the page shows of a run beside its metrics.

    Attributes:
        views: an image and its views in each row.
        neighbours: an image and its nearest ones in each row.
        attention: an image and the attention of the class token in each row.
        features: in two dimensions; None with a reason in `no_features`.
        no_features: why there is no such chart.
        checkpoints: a table.
        differences: fields in which the config differs from its recipe.
        environment: a table.
        speed: sentences about the speed of the device.
        memory: sentences about memory.
    """

    views: Tiles = Tiles(why=LEFT_OUT)
    neighbours: Tiles = Tiles(why=LEFT_OUT)
    attention: Tiles = Tiles(why=LEFT_OUT)
    features: FeatureMap | None = None
    no_features: str = LEFT_OUT
    checkpoints: Table = Table(why="Not read.")
    differences: Table = Table(why="Not compared.")
    environment: Table = Table(why="Not recorded.")
    speed: Sequence[str] = ()
    memory: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
