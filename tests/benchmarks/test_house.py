"""The rooms of the packages: few, on few floors, and no import back up."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.house import PACKAGES, survey

LIMITS = {"fastmoco": (18, 9, 55), "fastmoco_pipelines": (15, 8, 60)}
"""Rooms, floors and arrows at most."""


@pytest.mark.parametrize("package", LIMITS)
def test_a_package_has_few_rooms_on_few_floors_and_no_circle(package: str) -> None:
    house = survey(package, PACKAGES[package])
    rooms, floors, arrows = LIMITS[package]
    assert house.circles == []
    assert len(house.floors) <= rooms
    assert house.height <= floors
    assert len(house.arrows) <= arrows


def test_imports_are_found_wherever_they_are_written(tmp_path: Path) -> None:
    for name, text in {
        "__init__.py": "from own.high.top import f",
        "high/__init__.py": "",
        "high/top.py": "from own import low\n\n\ndef f():\n    from own.middle import g\n    return g",
        "middle.py": "import own.low.ground",
        "low/__init__.py": "",
        "low/ground.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    house = survey("own", tmp_path)
    assert house.floors == {"__init__": 4, "high": 3, "middle": 2, "low": 1}
    assert set(house.arrows) == {
        ("__init__", "high"),
        ("high", "low"),
        ("high", "middle"),
        ("middle", "low"),
    }
    assert house.circles == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "three"), ("three", "one")):
        (tmp_path / f"{name}.py").write_text(f"from own.{other} import x")
    assert [set(circle) for circle in survey("own", tmp_path).circles] == [{"one", "two", "three"}]
