"""Folders of images in the config of a run: packed once beside the run, and kept while it lasts.

The place and the key are those of decision 0015.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fastmoco.config import Config, resolve
from fastmoco.distributed.first_rank import first_rank_does
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.training.start import Start
from fastmoco_pipelines import ShardSet
from fastmoco_pipelines.making.folder_cache import (
    FolderState,
    PackedFolder,
    PackOptions,
    changes,
    folder_state,
    max_side_of,
    of_field,
    read_packed,
)

FOLDER = "packed"
"""Name of the folder of packed images beside the folder of a run."""


class Pack(Protocol):
    """Packs a folder of images unless it is packed, and shows that to the user."""

    def __call__(
        self,
        images: Path,
        root: Path,
        options: PackOptions,
        *,
        named: str,
        state: FolderState | None = None,
    ) -> PackedFolder:
        """Pack `images` into `root`; `named` is the field that errors name."""


def max_side_of_run(config: Config) -> int:
    """Pixels to which the longer sides of packed images are shrunk."""
    return config.data.max_side or max_side_of(config.data.view1.size)


def max_side_for(size: int, config: Config | None) -> int:
    """The same for the images of an encoder: of a run, or of this image size."""
    return max_side_of(size) if config is None else max_side_of_run(config)


def with_shards(
    config: Config,
    out: Path,
    world: World,
    start: Start,
    *,
    pack: Pack,
    tell: Callable[[str], None],
) -> Config:
    """The config of a run with shards in place of folders of images. Rank 0 packs, the other ranks
    wait; all call this together.

    Args:
        config: as given by the user.
        out: folder of the run.
        world: this process among its peers.
        start: of the run. One that continues keeps the images it began with.
        pack: called on rank 0.
        tell: called on rank 0 with each line for the user.

    Raises:
        ValueError: if a folder has no image that can be used.
        RunError: if a set cannot be written, or the split of a continued run would change.
    """
    if not (config.data.images or config.knn.images):
        return config
    folders = _Folders(config, out.parent / FOLDER, world.world_size, start, pack, tell)
    found: list[Any] = json.loads(
        first_rank_does(world, "packed", lambda: json.dumps(folders.shards()))
    )
    return replace(
        config,
        data=replace(config.data, images="", shards=found[0]),
        knn=replace(config.knn, images="", holdout="", test_shards=found[1]),
    )


class _Folders:
    """The folders of a config, on rank 0."""

    def __init__(
        self,
        config: Config,
        root: Path,
        processes: int,
        start: Start,
        pack: Pack,
        tell: Callable[[str], None],
    ) -> None:
        self.config = config
        self.processes = processes
        self.root = root
        self.start = start
        self.pack = pack
        self.tell = tell

    def shards(self) -> tuple[str, str]:
        """Patterns of the training and of the held-out shards."""
        data, knn = self.config.data, self.config.knn
        train, test = data.shards, knn.test_shards
        classes: tuple[str, ...] | None = None
        trained = ""
        if data.images:
            images = Path(data.images)
            packed = self._of_run() or self._new(images)
            if knn.holdout_share and not packed.state.classes:
                self.tell(
                    f"{images} has no class folders, so kNN is not possible, and no image is held "
                    "out"
                )
            train, test = packed.pattern, packed.test_pattern or test
            classes, trained = packed.state.classes, packed.state.path
        if knn.images:
            test = self._held_out(classes, trained)
        return train, test

    def _new(self, images: Path) -> PackedFolder:
        """The images of a new run; too few of them are refused before they are packed."""
        try:
            state = folder_state(images)
        except ValueError as error:
            raise of_field(error, "data.images") from error
        resolve(self.config, world_size=self.processes, sample_count=state.images)
        if self.config.knn.images:
            self._state_held_out(state.classes)  # refused before hours of packing
        return self.pack(images, self.root, self._options(), named="data.images", state=state)

    def _options(self) -> PackOptions:
        share = self.config.knn.holdout_share
        return PackOptions(
            max_side=max_side_of_run(self.config),
            holdout=share,
            seed=self.config.seed if share else 0,
        )

    def _of_run(self) -> PackedFolder | None:
        """The packed images that a continued run began with; None for a new run, for one that began
        with other images, and where they are gone.

        Raises:
            RunError: if another share is held out than at the beginning.
        """
        if self.start.checkpoint is None:
            return None
        shards = Path(str(self.start.checkpoint.state["config"]["data"].get("shards", "")))
        packed = read_packed(self.root / shards.parent.name) or read_packed(shards.parent)
        if packed is None or packed.state.path != os.path.realpath(self.config.data.images):
            return None

        # The split of the run.
        share = self.config.knn.holdout_share
        if share and share != packed.options.holdout:
            raise RunError(
                f"knn.holdout={self.config.knn.holdout!r}: this run began with a share of "
                f"{packed.options.holdout:g}, and another one would change the images that it is "
                "trained on; omit --knn.holdout to keep it, or choose another --out for a new run"
            )

        # The state of the folder.
        try:
            differ = changes(packed.state, folder_state(Path(self.config.data.images)))
        except (ValueError, OSError):
            differ = ["it is gone"]
        if differ:
            self.tell(
                f"{self.config.data.images} has changed since it was packed ({'; '.join(differ)}); "
                f"the run continues with the {packed.samples} images in {packed.folder}; for the "
                "new ones choose another --out"
            )
        else:
            self.tell(f"images of {self.config.data.images}: {packed.samples} in {packed.folder}")
        return packed

    def _held_out(self, classes: tuple[str, ...] | None, trained: str) -> str:
        """The shards of the folder of held-out images; empty if kNN is not possible.

        Args:
            classes: of the training images; None: those of the shards.
            trained: folder of the training images; empty: shards are given.
        """
        images = Path(self.config.knn.images)
        if classes is None:
            opened = ShardSet.open(self.config.data.shards, cache=self.config.data)
            classes = opened.classes
            opened.close()
        state = self._state_held_out(classes)
        missing = [
            str(where)
            for where, names in (
                (self.config.data.images or self.config.data.shards, classes),
                (images, state.classes),
            )
            if not names
        ]
        if missing:
            self.tell(
                f"{missing[0]} has no class folders, so kNN is not possible; training goes on "
                "without it"
            )
            return ""
        options = replace(
            self._options(), holdout=0.0, seed=0, prefix="test", classes=classes, apart_from=trained
        )
        return self.pack(images, self.root, options, named="knn.images", state=state).pattern

    def _state_held_out(self, classes: tuple[str, ...]) -> FolderState:
        """The folder of held-out images.

        Raises:
            ValueError: if it has no images, or classes that the training images have not.
        """
        images = self.config.knn.images
        try:
            state = folder_state(Path(images))
        except ValueError as error:
            raise of_field(error, "knn.images") from error
        unknown = sorted(set(state.classes) - set(classes))
        if unknown and classes:
            raise ValueError(
                f"knn.images={images!r}: has classes that the training images have not: "
                f"{', '.join(unknown[:5])}; give it the same class folders"
            )
        return state
