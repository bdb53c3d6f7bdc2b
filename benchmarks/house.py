"""The rooms of each package, from the imports of its own code: floors, arrows,
circles, and the size of its files.

    python -m benchmarks.house             the table
    python -m benchmarks.house --arrows    with every import between two rooms

A room is a folder or a module directly in a package. There is an arrow if a module of one room
imports a module of another, also inside a function or for type checking. The floor of a room is one
more than the highest floor that it imports. Imports of the package itself do not count: its
`__init__` exports what the rooms define.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "fastmoco": ROOT / "fastmoco",
    "fastmoco_pipelines": ROOT / "pipelines" / "fastmoco_pipelines",
    "fastmoco_kernels": ROOT / "kernels" / "fastmoco_kernels",
    "benchmarks": ROOT / "benchmarks",
}
WIDE = 100
"""Characters that a line should not exceed."""


@dataclass(frozen=True, slots=True)
class House:
    """Rooms and imports of a package.

    Attributes:
        floors: room -> its floor, from 1.
        arrows: (room, imported room) -> its imports, as "module -> module".
        circles: rooms that import each other, one tuple for each circle found.
    """

    floors: dict[str, int]
    arrows: dict[tuple[str, str], set[str]]
    circles: list[tuple[str, ...]]

    @property
    def height(self) -> int:
        """Number of floors."""
        return max(self.floors.values())


def survey(package: str, folder: Path) -> House:
    """Read the imports of a package.

    Args:
        package: import name.
        folder: of its files.
    """
    modules = {_name(package, folder, path): path for path in sorted(folder.rglob("*.py"))}
    rooms = {_room(name) for name in modules}
    arrows: dict[tuple[str, str], set[str]] = {}
    for name, path in modules.items():
        for target in _imports(ast.parse(path.read_text()), package, modules):
            here, there = _room(name), _room(target)
            if here != there and there != "__init__":
                arrows.setdefault((here, there), set()).add(f"{name} -> {target}")

    below = {room: sorted(there for here, there in arrows if here == room) for room in rooms}
    floors: dict[str, int] = {}
    circles: list[tuple[str, ...]] = []

    def floor(room: str, path: tuple[str, ...]) -> int:
        if room in path:
            circles.append((*path[path.index(room) :], room))
            return 0
        if room not in floors:
            floors[room] = 1 + max(
                (floor(there, (*path, room)) for there in below[room]), default=0
            )
        return floors[room]

    for room in sorted(rooms):
        floor(room, ())
    return House(floors, arrows, circles)


def share_of_wide_lines(folder: Path) -> tuple[int, float]:
    """Lines of the Python files of a folder, and the share of them that
    exceed `WIDE` characters.
    """
    lines = [line for path in folder.rglob("*.py") for line in path.read_text().splitlines()]
    return len(lines), sum(len(line) > WIDE for line in lines) / len(lines)


def _name(package: str, folder: Path, path: Path) -> str:
    parts = [package, *path.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(name: str) -> str:
    return (*name.split("."), "__init__")[1]


def _imports(tree: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of a package that some code imports, anywhere in the file."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == package
        ):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == package)


def _print(package: str, folder: Path, *, arrows: bool) -> None:
    house = survey(package, folder)
    lines, wide = share_of_wide_lines(folder)
    print(
        f"{package}: {len(house.floors)} rooms, {house.height} floors, {len(house.arrows)} arrows, "
        f"{len(house.circles)} circles; {lines:,} lines, {wide:.1%} over {WIDE} characters"
    )
    for floor in range(house.height, 0, -1):
        rooms = sorted(room for room, its in house.floors.items() if its == floor)
        print(f"  {floor}  {'  '.join(rooms)}")
    for circle in house.circles:
        print(f"  circle: {' -> '.join(circle)}")
    if arrows:
        for (here, there), imports in sorted(house.arrows.items()):
            print(f"  {here} -> {there}: {len(imports)}, e.g. {min(imports)}")


def main() -> None:
    """Print the table of every package."""
    parser = argparse.ArgumentParser(description="rooms, floors and arrows of each package")
    parser.add_argument("--arrows", action="store_true", help="list the imports between rooms")
    options = parser.parse_args()
    for package, folder in PACKAGES.items():
        _print(package, folder, arrows=options.arrows)


if __name__ == "__main__":
    main()
