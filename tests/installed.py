"""Build the distributions, check them, and use the wheel as a user would: in a fresh environment, away
from the repository.

`make dist` builds an sdist and, from it alone, two wheels in `dist/`: one with the C part, and one as a
machine without a compiler gets it. `make installed` then installs each into an environment of its own. In
the first, which has the C part, the whole quickstart runs. In the second, without a compiler on PATH, a
training of two epochs runs. A third has torch and its own requirements alone, for `fastmoco_kernels`.

`make trackio`, a part of `make installed`, installs the wheel with its extra `trackio`, which wants an
older Pillow than `constraints.txt` has, and runs the test that reads back what trackio has logged.

The environments take the other packages from `.venv`, by a list of folders: only fastmoco itself is
installed, and for trackio what `tests/trackio.txt` names. Its modules must come from there, which is
checked.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "fastmoco_kernels/cut_views/_native.abi3.so"
INDEX = "this needs the package index: pip says above whether it could be reached"
PINS = ROOT / "tests" / "trackio.txt"
READ_BACK = "tests/fastmoco/telemetry/trackers/test_read_back.py"
COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")
BUILD_FILES = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"),
    *("kernels/fastmoco_kernels/cut_views/native/views.h",),
)
"""Of the sdist, beside the packages and the C sources."""
ROOTS = {
    "fastmoco": ROOT,
    "fastmoco_kernels": ROOT / "kernels",
    "fastmoco_pipelines": ROOT / "pipelines",
}
KERNELS = """
import importlib.util, sys
absent = [name for name in ("tyro", "webdataset", "PIL", "rich", "safetensors", "urllib3")
          if importlib.util.find_spec(name)]
if absent:
    sys.exit(f"this environment should have torch alone, not {absent}")
import torch
import fastmoco_kernels
from fastmoco_kernels import attention, ema_update_, info_nce_loss
q, keys = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1)
loss = info_nce_loss(q, keys, temperature=0.2)
averages = [torch.zeros(2)]
ema_update_(averages, [torch.ones(2)], 0.75)
assert torch.isfinite(loss) and averages[0].tolist() == [0.25, 0.25]
print("fastmoco_kernels with torch alone:", fastmoco_kernels.__file__)
"""
FROM_WHEEL = """
import pathlib, sys
import fastmoco, fastmoco_kernels, fastmoco_pipelines
from fastmoco_kernels.cut_views.native import native_library
for module in (fastmoco, fastmoco_kernels, fastmoco_pipelines):
    if not pathlib.Path(module.__file__).is_relative_to(sys.prefix):
        sys.exit(f"{module.__name__} is from {module.__file__}, not from the wheel in {sys.prefix}")
found = native_library() is not None
if found != (sys.argv[1] == "compiled"):
    sys.exit(f"the C part is {'there' if found else 'missing'} in the {sys.argv[1]} wheel")
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Build and check; install and run on demand."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of the result")
    parser.add_argument("--install", action="store_true", help="install the wheels and use them")
    parser.add_argument("--trackio", action="store_true", help="test trackio with its own Pillow")
    parser.add_argument("--out", type=Path, default=None, help="a folder for the quickstart")
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    dist = chosen.dist.resolve()
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="fastmoco-installed-") as name:
        home = Path(name)
        sdist, compiled, pure = build(dist, home)
        check(sdist, compiled, pure)
        say(f"built and checked after {time.monotonic() - began:.0f} s")
        if chosen.trackio:
            read_back(compiled, home)
            say(f"trackio tested after {time.monotonic() - began:.0f} s")
        if chosen.install:
            use(compiled, pure, home, chosen.out and chosen.out.resolve())
            say(f"installed and used after {time.monotonic() - began:.0f} s")


def say(text: str) -> None:
    """Print a line at once."""
    print(f"installed: {text}", flush=True)


def run(*words: str | Path, path: str | None = None, cwd: Path = ROOT, cure: str = "") -> str:
    """Run a program, show what it says if it fails, and return its output.

    Args:
        words: the program and its arguments.
        path: PATH, in place of this process's.
        cwd: where it runs.
        cure: what is said beside the exit code if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment |= {"PATH": path}
        environment.pop("CC", None)
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout)
        told = f"ended with code {done.returncode}{cure and '; '}{cure}"
        sys.exit(f"installed: {' '.join(map(str, words))}: {told}")
    return done.stdout


def tool(name: str) -> str:
    """A program of this environment."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def without_compilers(home: Path) -> str:
    """A PATH with all programs of this one but the compilers."""
    folder = home / "programs"
    folder.mkdir()
    for place in map(Path, reversed(os.get_exec_path())):
        for program in place.iterdir() if place.is_dir() else ():
            link = folder / program.name
            link.unlink(missing_ok=True)
            if not re.match(r"(.*-)?(cc|gcc|clang|c\+\+|g\+\+|clang\+\+)(-[\d.]+)?$", program.name):
                link.symlink_to(program)
    assert not any(shutil.which(name, path=str(folder)) for name in COMPILERS)
    return str(folder)


def build(dist: Path, home: Path) -> tuple[Path, Path, Path]:
    """The sdist, the wheel that a compiler makes of it, and the wheel without one."""
    python = sys.executable
    run(python, "-m", "build", "--sdist", "--outdir", dist, ROOT, cure=INDEX)
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(home / "source", filter="data")
    (source,) = (home / "source").iterdir()
    wheels = []
    for path in (None, without_compilers(home)):
        copy = home / f"source-{len(wheels)}"
        shutil.copytree(source, copy)
        folder = home / f"wheel-{len(wheels)}"
        words = ("--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", folder)
        run(python, "-m", "build", *words, copy, path=path)
        (wheel,) = folder.iterdir()
        wheels.append(dist / wheel.name)
        shutil.move(wheel, wheels[-1])
    return sdist, wheels[0], wheels[1]


def modules() -> set[str]:
    """Files of the packages, by their place in the wheel: all but READMEs, the sources in C and what
    was built from them."""
    left_out = {".c", ".h", ".so", ".pyc", ".md"}
    found = {
        str(path.relative_to(folder))
        for package, folder in ROOTS.items()
        for path in (folder / package).rglob("*")
        if path.is_file() and path.suffix not in left_out
    }
    assert len(found) > 400
    return found


def check(sdist: Path, compiled: Path, pure: Path) -> None:
    """Names, metadata and content."""
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, compiled, pure)
    run(tool("check-wheel-contents"), compiled, pure)

    # Names say what is in them.
    text = (ROOT / "fastmoco" / "__init__.py").read_text()
    version = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]
    expected = f"fastmoco-{version}-py3-none-{re.sub('[-.]', '_', sysconfig.get_platform())}.whl"
    require(compiled.name == expected, f"{compiled.name}, not {expected}")
    require(pure.name == f"fastmoco-{version}-py3-none-any.whl", pure.name)
    told = run(tool("auditwheel"), "show", compiled)
    require("manylinux" in told, f"auditwheel: {told}")
    say(f"auditwheel: {' '.join(re.findall(r'manylinux_[0-9]+_[0-9]+_[a-z0-9_]+', told)[:1])}")

    # Wheels contain the packages and, of one of them, the library: no tests, no sources in C.
    for wheel, more in ((compiled, {LIBRARY}), (pure, set[str]())):
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
        require(names == modules() | more, f"{wheel.name}: {sorted(names ^ (modules() | more))}")

    # The sdist contains what the wheels are built from.
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.c")}
    wanted |= {*BUILD_FILES, "kernels/fastmoco_kernels/py.typed"}
    require(wanted <= names, f"{sdist.name}: lacks {sorted(wanted - names)}")
    stray = [name for name in names if name.startswith(("tests", "benchmarks")) or ".so" in name]
    require(not stray, f"{sdist.name}: {stray}")
    sizes = (f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in (sdist, compiled, pure))
    say(", ".join(sizes))


def require(fact: bool, text: str) -> None:
    """End with a text unless something is so."""
    if not fact:
        sys.exit(f"installed: {text}")


def install(inside: Path, *words: str | Path) -> None:
    """Install something by the pip of this environment into that of another interpreter."""
    pip = (sys.executable, "-m", "pip", "--python", inside, "install", "--quiet")
    cure = "" if "--no-index" in words else INDEX
    run(*pip, "--disable-pip-version-check", *words, cwd=inside.parent, cure=cure)


def environment(home: Path, name: str, wheel: Path, packages: Path) -> Path:
    """A fresh environment with the wheel, and the other packages from a folder.

    Args:
        home: where it is made.
        name: of its folder.
        wheel: that is installed.
        packages: folder that is searched after its own.

    Returns:
        The folder of its programs.
    """
    folder = home / name
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    install(folder / "bin" / "python", "--no-deps", "--no-index", wheel)
    own = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(own) / "packages.pth").write_text(f"{packages}\n")
    return folder / "bin"


def torch_alone(home: Path) -> Path:
    """A folder with torch and what its metadata asks for, as links."""
    folder = home / "torch-alone"
    folder.mkdir()
    waiting, seen = ["torch", "numpy"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link, target = folder / top, Path(str(distribution.locate_file(top)))
            if target.exists() and not link.exists():
                link.symlink_to(target)
        for line in distribution.requires or ():
            wanted, _, marker = line.partition(";")
            found = re.match(r"[\w.-]+", wanted)
            if found and "extra" not in marker and _installed(found[0]):
                waiting.append(found[0])
    return folder


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def read_back(wheel: Path, home: Path) -> None:
    """Install the wheel with its extra `trackio`, in the versions of PINS, and run the test of trackio
    there; one that is skipped is a failure.
    """
    programs = environment(home, "trackio", wheel, Path(sysconfig.get_path("purelib")))
    inside = programs / "python"
    install(inside, "-c", PINS, f"{wheel}[trackio]")

    # Nothing that is not pinned, so that every machine tests the same versions.
    own = sysconfig.get_path("purelib", vars={"base": str(programs.parent)})
    found = {f"{one.name}=={one.version}" for one in importlib.metadata.distributions(path=[own])}
    free = {one for one in found if not one.startswith("fastmoco==")}
    free -= set(PINS.read_text().splitlines())
    require(
        not free, f"{PINS} lacks {', '.join(sorted(free))}, which pip has installed for trackio"
    )

    # The test away from the repository, so that it takes fastmoco from the wheel.
    place = home / "read-back"
    for name in ("pyproject.toml", "tests/conftest.py", "tests/tracked_runs.py", READ_BACK):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    run(inside, "-c", FROM_WHEEL, "compiled", cwd=place)
    test = (f"{READ_BACK}::test_trackio_on_this_machine", "-rs", "--basetemp", home / "runs")
    told = run(inside, "-m", "pytest", *test, cwd=place)
    require("\n1 passed in " in told, f"the test of trackio has not run: {told}")


def use(compiled: Path, pure: Path, home: Path, out: Path | None) -> None:
    """Install the wheels and run commands in an empty folder."""
    packages = Path(sysconfig.get_path("purelib"))
    place = home / "place"
    place.mkdir()
    machine_path = os.environ["PATH"]
    bare_path = str(home / "programs")

    # The kernels with torch and nothing else.
    programs = environment(home, "kernels", compiled, torch_alone(home))
    print(run(programs / "python", "-c", KERNELS, cwd=place), end="")

    # Without a compiler: the same views by plain torch, and a short training.
    programs = environment(home, "pure", pure, packages)
    path = f"{programs}{os.pathsep}{bare_path}"
    run(programs / "python", "-c", FROM_WHEEL, "pure", path=path, cwd=place)
    told = run("fastmoco", "doctor", path=path, cwd=place)
    require("C part" in told and "--force-reinstall" in told, f"doctor, no C part: {told}")
    require("training can run here" in told, f"doctor: {told}")
    run("fastmoco", "data", "sample", "digits", "digits", path=path, cwd=place)
    shards = ("--data.shards", "digits/train-*.tar", "--knn.test-shards", "digits/test-*.tar")
    short = ("--epochs", "2", "--out", "short")
    run("fastmoco", "train", "quickstart_digits", *shards, *short, path=path, cwd=place)
    say("the wheel without the C part: doctor, data sample, train")

    # With the C part: the quickstart, whose figures the caller reads.
    programs = environment(home, "compiled", compiled, packages)
    path = f"{programs}{os.pathsep}{machine_path}"
    run(programs / "python", "-c", FROM_WHEEL, "compiled", path=path, cwd=place)
    print(run("fastmoco", "--version", path=path, cwd=place), end="", flush=True)
    if out is not None:
        print(run("fastmoco", "quickstart", "--out", out, path=path, cwd=place), flush=True)


if __name__ == "__main__":
    main()
