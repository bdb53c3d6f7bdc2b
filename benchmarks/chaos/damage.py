"""What is done to files before a start, and how it is taken back where only a person could."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

from benchmarks.chaos.plan import Event

PRECIOUS = b"a file outside the run that nothing may change\n"


class Folder:
    """The folder of a story: shards in `data`, the run in `run`, a file `precious` outside.

    Attributes:
        path: of all.
        run: the folder of the run.
        touched: files that events have damaged, by their names of `plan.WHERE`.
    """

    def __init__(self, path: Path, shards: Path) -> None:
        self.path = path
        self.run = path / "run"
        self.touched: set[str] = set()
        self._full = False
        path.mkdir()
        shutil.copytree(shards, path / "data")
        (path / "precious").write_bytes(PRECIOUS)

    def damage(self, event: Event) -> str:
        """Do what an event says; returns the file's name, empty if there was nothing to do it to."""
        rng = Random(event.seed)
        if event.what == "full disk":
            return self._fill_disk()
        if event.what == "read-only folder":
            folder = self.run if event.whom == "run" else self.run / "checkpoints"
            if not folder.is_dir():
                return ""
            folder.chmod(0o500)
            return folder.name
        path = self._file(rng, event.whom)
        if path is None:
            return ""
        if path.is_symlink() or not path.is_file():  # of an earlier event
            return ""
        self.touched.add(event.whom)
        _ACTIONS[event.what](rng, path, self.path / "precious")
        return str(path.relative_to(self.path))

    def _file(self, rng: Random, whom: str) -> Path | None:
        """A file of a name of `plan.WHERE` that exists; for some names one that may be missing."""
        run, data = self.run, self.path / "data"
        if whom == "checkpoint":
            folders = sorted((run / "checkpoints").glob("step_*"))
            found = sorted(folders[-1].iterdir()) if folders else []
            return rng.choice(found) if found else None
        choices = {
            "metrics": [run / "metrics.jsonl"],
            "config": [run / "config.json"],
            "starts": [run / "starts.json"],
            "mark": [run / "DONE", run / "PREEMPTED"],
            "lock": [run / "lock"],
            "curves": [run / "curves.png"],
            "quarantine": [run / "quarantine.jsonl"],
            "log": [run / "torchrun.log"],
            "index": sorted(data.glob("train-*.index")),
            "manifest": [data / "manifest.json"],
            "list beside the shards": [data / "quarantine.jsonl"],
        }[whom]
        if not choices or not choices[0].parent.is_dir():
            return None
        path = next((one for one in choices if os.path.lexists(one)), choices[0])
        if not os.path.lexists(path):
            path.write_bytes(b"{}\n")  # where there is none, something is put in its place
        return path

    def _fill_disk(self) -> str:
        """Put the run on a small file system of its own that is nearly full; "" where that is not
        allowed."""
        if self._full or not self.run.is_dir():
            return ""
        moved = self.path / "run-before"
        used = sum(file.lstat().st_size for file in self.run.rglob("*") if file.is_file())
        self.run.rename(moved)
        self.run.mkdir(mode=0o700)
        size = f"size={used + (3 << 20)}"
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{size},mode=0700", "tmpfs", str(self.run)],
            capture_output=True,
            check=False,
        )
        if made.returncode:
            self.run.rmdir()
            moved.rename(self.run)
            return ""
        shutil.copytree(moved, self.run, symlinks=True, dirs_exist_ok=True)
        self._full = True
        self.touched.add("disk")
        return "run"

    def make_room(self) -> bool:
        """Take the run back to a disk with room; whether it was on a full one."""
        if not self._full:
            return False
        moved = self.path / "run-before"
        shutil.rmtree(moved)
        shutil.copytree(self.run, moved, symlinks=True)
        subprocess.run(["umount", "-l", str(self.run)], check=True)
        self.run.rmdir()
        moved.rename(self.run)
        self._full = False
        return True

    def begin_again(self) -> None:
        """Put a finished run away: the next start begins another one."""
        self.make_room()
        self.allow_writing()
        shutil.rmtree(self.run)
        self.touched.clear()

    def allow_writing(self) -> bool:
        """Give the owner all rights again; whether any was missing."""
        changed = False
        for path in (self.run, *self.run.rglob("*"), *(self.path / "data").iterdir()):
            if path.is_symlink():
                continue
            wanted = 0o700 if path.is_dir() else 0o600
            if path.stat().st_mode & wanted != wanted:
                path.chmod(path.stat().st_mode | wanted)
                changed = True
        return changed

    def precious_is_changed(self) -> bool:
        """Whether the file outside has another content."""
        return (self.path / "precious").read_bytes() != PRECIOUS


def _flip(rng: Random, path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def _cut(rng: Random, path: Path, _: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size + 1))


def _garbage(rng: Random, path: Path, _: Path) -> None:
    with path.open("ab") as file:
        file.write(rng.choice((b"\xff", b"\x00" * 512, b'{"step": ', rng.randbytes(999))))


def _zeros(rng: Random, path: Path, _: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(rng.randrange(size + 1))
        file.write(bytes(min(4096, size)))


def _replace(make: Callable[[Path, Path], None]) -> Callable[[Random, Path, Path], None]:
    def replaced(_: Random, path: Path, precious: Path) -> None:
        path.unlink()
        make(path, precious)

    return replaced


_ACTIONS: dict[str, Callable[[Random, Path, Path], None]] = {
    "flip": _flip,
    "cut": _cut,
    "empty": lambda rng, path, _: os.truncate(path, 0),
    "garbage": _garbage,
    "zeros": _zeros,
    "remove": lambda rng, path, _: path.unlink(),
    "link": _replace(lambda path, precious: path.symlink_to(precious)),
    "endless link": _replace(lambda path, _: path.symlink_to("/dev/zero")),
    "pipe": _replace(lambda path, _: os.mkfifo(path)),
    "folder": _replace(lambda path, _: path.mkdir()),
    "unreadable": lambda rng, path, _: path.chmod(0),
}
