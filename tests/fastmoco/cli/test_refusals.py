"""A command that is refused leaves everything as it was: no folder, no lock, no mark is made or
changed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastmoco.cli.train import train
from fastmoco.errors import RunError
from fastmoco.run import folder as run_folder
from fastmoco.run.folder import RunFolder
from tests.command_line import main
from tests.fault_runs import environment

pytest.importorskip("tyro", reason="tyro is not installed")


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Every file and folder below `root`: content, permissions and time of change."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        state = path.lstat()
        what: tuple[object, ...] = (oct(state.st_mode),)
        if path.is_file():
            what += (hashlib.sha256(path.read_bytes()).hexdigest(), state.st_mtime_ns)
        found[str(path.relative_to(root))] = what
    return found


@pytest.fixture(scope="module")
def finished(small_run, tmp_path_factory):
    """The folder of a run of five steps; tests work on a copy."""
    config = replace(small_run, epochs=1, optim=replace(small_run.optim, warmup_epochs=0))
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(config, out) == 0
    return out


@pytest.fixture
def place(tmp_path, finished, digits, monkeypatch):
    """A folder in which commands run: a set, a run, some images, and the user's cache."""
    root = tmp_path / "place"
    shutil.copytree(Path(digits[0]).parent, root / "set")
    shutil.copytree(finished, root / "run")
    (root / "run" / "starts.json").write_text('{"launch": null, "step": 0, "starts": 1}\n')
    (root / "no_images" / "a").mkdir(parents=True)
    (root / "no_images" / "a" / "notes.txt").write_text("text")
    (root / "bad_images").mkdir()
    (root / "bad_images" / "a.jpg").write_bytes(b"no image")
    (root / "file").write_text("a file")
    (root / "cache").mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    return root


SMALL = ["quickstart_digits", "--data.shards", "set/train-*.tar", "--threads", "1"]
TRAIN = {
    "unknown option": [*SMALL, "--lr", "1"],
    "wrong value": [*SMALL, "--epochs", "many"],
    "fields that do not fit": [*SMALL, "--model.patch-size", "3"],
    "fewer than no processes": [*SMALL, "--gpus", "-1"],
    "no shards": ["quickstart_digits"],
    "shards that are not there": [*SMALL[:1], "--data.shards", "none/*.tar"],
    "a file that is no shard": [*SMALL[:1], "--data.shards", "file"],
    "batch larger than the set": [*SMALL, "--global-batch-size", "100000"],
    "no GPU": [*SMALL, "--device", "cuda"],
    "no GPU for the images": [*SMALL, "--data.device", "gpu"],
    "held-out shards that are not there": [*SMALL, "--knn.test-shards", "none/*.tar"],
    "unknown optimizer backend": [*SMALL, "--optim.name", "lamb", "--optim.fused-backend", "apex"],
    "a field that cannot change": [*SMALL, "--allow", "seed"],
}


@pytest.mark.parametrize("case", [name for name in TRAIN if name != "a field that cannot change"])
@pytest.mark.parametrize("out", ["new/deep", "run"])
def test_a_refused_run_leaves_nothing_behind(case, out, place, capsys):
    before = tree(place)
    assert main(["train", *TRAIN[case], "--out", out]) == 2
    assert capsys.readouterr().err.startswith("fastmoco: ")
    assert tree(place) == before


@pytest.mark.parametrize(
    "words",
    [TRAIN["a field that cannot change"], [*SMALL, "--optim.lr", "1"], [*SMALL, "--seed=5"]],
)
def test_a_refused_continuation_changes_nothing(words, place, capsys):
    before = tree(place)
    assert main(["train", *words, "--out", "run"]) == 2
    assert tree(place) == before


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_wrong_out_is_left_alone(out, place, capsys):
    before = tree(place)
    assert main(["train", *SMALL, "--out", out]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert tree(place) == before


def test_a_refusal_while_the_run_is_built_leaves_nothing_behind(place, capsys, monkeypatch):
    """After the loader and the model are made."""
    from fastmoco.planning import choose

    def unknown(*_):
        raise ValueError("this system does not report its memory")

    monkeypatch.setattr(choose, "free_bytes", unknown)
    before = tree(place)
    assert main(["train", *SMALL, "--out", "new"]) == 2
    assert "does not report its memory" in capsys.readouterr().err
    assert tree(place) == before


OTHERS = {
    "pack: no such folder": ["data", "pack", "none", "new/deep"],
    "pack: no images": ["data", "pack", "no_images", "new/deep"],
    "pack: no image can be used": ["data", "pack", "bad_images", "new/deep"],
    "pack: quality": ["data", "pack", "bad_images", "new", "--quality", "0"],
    "pack: a set is there": ["data", "pack", "bad_images", "set"],
    "pack: out is a file": ["data", "pack", "bad_images", "file"],
    "index: no such tar": ["data", "index", "none/*.tar"],
    "index: no tar": ["data", "index", "file"],
    "index: labels": ["data", "index", "set/*.tar", "--labels=cls", "--label-field=x"],
    "index: out for local shards": ["data", "index", "none/*.tar", "--out", "new/deep"],
    "check: no such tar": ["data", "check", "none/*.tar", "--json", "new/report.json"],
    "check: sample": ["data", "check", "set/train-*.tar", "--sample=0", "--json", "new/x.json"],
    "stats: no such tar": ["data", "stats", "none/*.tar", "--out", "new/stats.png"],
    "views: no such tar": ["data", "views", "none/*.tar", "--out", "new/views.png"],
    "views: rows": ["data", "views", "set/train-*.tar", "--rows=0", "--out", "new/views.png"],
    "sample: out is a file": ["data", "sample", "digits", "file"],
    "list: no checkpoint": ["checkpoint", "list", "set"],
    "verify: no checkpoint": ["checkpoint", "verify", "none"],
    "consolidate: no checkpoint": ["checkpoint", "consolidate", "set", "--out", "new/a.st"],
    "consolidate: out exists": ["checkpoint", "consolidate", "run", "--out", "file"],
    "knn: no checkpoint": [
        "eval",
        "knn",
        "set",
        "--train=set/train-*.tar",
        "--test=set/test-*.tar",
    ],
    "knn: no shards": ["eval", "knn", "run", "--train=set/train-*.tar", "--test=none/*.tar"],
    "knn: k": ["eval", "knn", "run", "--train=set/train-*.tar", "--test=set/test-*.tar", "--k=0"],
    "quickstart: out is a file": ["quickstart", "--out", "file"],
    "plan: memory": ["plan", "quickstart_digits", "--memory", "much"],
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_refused_command_leaves_nothing_behind(case, place, capsys):
    before = tree(place)
    assert main(OTHERS[case]) == 2
    error = capsys.readouterr().err
    assert all(line.startswith("fastmoco: ") for line in error.splitlines())
    assert tree(place) == before


@pytest.fixture
def empty_server():
    """The address of a server that has no file."""

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "words",
    [
        ["data", "index", "{}/a.tar", "--out", "new/deep"],
        ["data", "check", "{}/a.tar", "--quarantine-out", "new/deep"],
        ["train", "quickstart_digits", "--data.shards", "{}/a.tar", "--out", "new/deep"],
    ],
)
def test_a_set_that_a_server_does_not_have_leaves_nothing_behind(words, place, empty_server):
    before = tree(place)
    assert main([word.format(empty_server) for word in words]) == 2
    made = {name: what for name, what in tree(place).items() if not name.startswith("cache/")}
    assert made == before
    assert not [path for path in (place / "cache").rglob("*") if path.is_file()]


@pytest.mark.faults
def test_refused_processes_leave_nothing_behind(place):
    """Several processes, and the marks of an earlier run."""
    out = place / "marked"
    out.mkdir(mode=0o700)
    (out / "DONE").write_text("\n")
    (out / "PREEMPTED").write_text("\n")
    before = tree(place)
    command = [sys.executable, "-m", "fastmoco", "train", *TRAIN["batch larger than the set"]]
    done = subprocess.run(
        [*command, "--out", str(out), "--gpus", "2"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
    )
    assert done.returncode == 2, done.stderr
    assert "--global-batch-size 100000: " in done.stderr
    assert tree(place) == before


def test_a_lock_that_another_start_removes_is_taken_again(tmp_path):
    """Between opening and locking the file, a refused start may have removed it."""
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.acquire()
    held = tmp_path / "run" / "lock"
    first.withdraw()
    assert not held.exists()
    second.acquire()
    with pytest.raises(Exception, match="in use"):
        first.acquire()
    second.release()
    assert held.exists()


def test_a_refused_start_keeps_the_lock_until_all_is_put_back(tmp_path, monkeypatch):
    """A new file in the place of the lock would be free at once, while others are put back."""
    folder, other = RunFolder(tmp_path), RunFolder(tmp_path)
    for name in ("lock", "starts.json"):
        (tmp_path / name).write_text("{}")
    before = (tmp_path / "lock").stat()
    folder.acquire()
    (tmp_path / "starts.json").write_text("[]")
    restored = []

    def write_file(path, *_, **__):
        with pytest.raises(RunError, match="in use"):
            other.acquire()
        restored.append(path.name)

    monkeypatch.setattr(run_folder, "write_file", write_file)
    folder.withdraw()
    assert restored == ["starts.json"]
    assert (tmp_path / "lock").read_text() == "{}"
    assert (tmp_path / "lock").stat().st_ino == before.st_ino
    other.acquire()
    other.release()
