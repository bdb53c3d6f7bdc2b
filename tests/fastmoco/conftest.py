"""A run that trains on digits in seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fastmoco.config import Config
from fastmoco.recipes import quickstart_digits
from tests.fault_runs import ROOT
from tests.real_peaks import RealPeaks


@pytest.fixture(scope="session")
def small_run(digits) -> Config:
    """Five steps per epoch, every step logged, a checkpoint every third step."""
    config = quickstart_digits()
    return replace(
        config,
        epochs=3,
        threads=1,
        log_every_steps=1,
        data=replace(config.data, shards=digits[0]),
        knn=replace(config.knn, every_epochs=0),
        checkpoint=replace(config.checkpoint, every_steps=3),
    )


@pytest.fixture(scope="session")
def brief_run(small_run, digits) -> Config:
    """The same with 360 images in batches of 64, for tests to which the size of a batch is nothing:
    also five steps per epoch, which take a third of the time.
    """
    data = replace(small_run.data, shards=digits[1])
    return replace(small_run, global_batch_size=64, data=data)


@pytest.fixture
def sinks_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of trackers find `tests.faulty_sinks`, as a user's own module, by PYTHONPATH."""
    folders = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))


@pytest.fixture(scope="module")
def real_peaks() -> Iterator[RealPeaks]:
    """Measures the memory of real steps."""
    with RealPeaks() as peaks:
        yield peaks
