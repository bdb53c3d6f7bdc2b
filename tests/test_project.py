"""What holds for the project as a whole: its layout, its exports, its files."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import FIRST, pytest_collection_modifyitems

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [
    ROOT / "fastmoco",
    ROOT / "kernels" / "fastmoco_kernels",
    ROOT / "pipelines" / "fastmoco_pipelines",
    ROOT / "benchmarks",
]
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))


def test_the_folders_of_the_import_roots_are_no_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "pipelines" / "__init__.py").exists()


@pytest.mark.parametrize(
    "name", ["fastmoco_kernels", "fastmoco_pipelines", "fastmoco.objectives", "fastmoco.checkpoint"]
)
def test_every_exported_name_exists_and_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for export in module.__all__:
        value = getattr(module, export)
        if callable(value):
            assert value.__doc__, f"{name}.{export} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_public_name_is_documented(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    bare = [
        n.name
        for n in tree.body
        if isinstance(n, kinds) and not n.name.startswith("_") and not ast.get_docstring(n)
    ]
    assert ast.get_docstring(tree)
    assert not bare


def test_the_readme_names_every_recipe():
    from fastmoco.recipes import RECIPES

    readme = (ROOT / "README.md").read_text()
    assert not [recipe for recipe in RECIPES if f"`{recipe}`" not in readme]


@pytest.mark.parametrize("folder", ["kernels", "pipelines"])
def test_the_folder_readme_names_every_file(folder):
    readme = (ROOT / folder / "README.md").read_text()
    package = next(p for p in (ROOT / folder).iterdir() if (p / "__init__.py").exists())
    missing = [
        str(path.relative_to(package))
        for path in sorted(package.rglob("*.py"))
        if path.name != "__init__.py" and str(path.relative_to(package)) not in readme
    ]
    assert not missing


def test_the_files_that_begin_first_exist():
    known = [path.as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    assert [sum(path.endswith(end) for path in known) for end in FIRST] == [1] * len(FIRST)


def test_the_map_of_fastmoco_names_every_room_and_no_other():
    package = ROOT / "fastmoco"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    rooms |= {path.stem for path in package.glob("*.py")} - {"__init__"}
    table = re.findall(r"^\| \d+ \| `(\w+)` \|", (package / "README.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(rooms)


def test_the_map_of_the_benchmarks_names_every_file_and_folder():
    package = ROOT / "benchmarks"
    readme = (package / "README.md").read_text()
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not {name for name in folders | files if f"`{name}`" not in readme}


def test_ci_goes_on_without_a_browser_and_says_so(tmp_path):
    """On a PATH with neither a browser nor apt-get."""
    for name in ("bash", "dirname", "grep", "id"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [tmp_path / "bash", ROOT / ".ci" / "browser"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert re.fullmatch(r"ci: no Chromium: .+ is going to be skipped\.\n", done.stdout)
    steps = (ROOT / ".ci" / "run").read_text()
    assert steps.index(".ci/browser") < steps.index("make long")


FORBIDDEN = {
    "an unpickler": r"\bpickle\.|\bimport pickle\b|\bfrom pickle\b|weights_only|torch\.load\(|\bnp\.load\(",
    "a shell": r"shell\s*=\s*True|os\.system|os\.popen",
    "an evaluator": r"(?<![\w.])eval\(|(?<![\w.])exec\(|yaml\.load\(",
    "webdataset's reader": r"webdataset\.WebDataset|wds\.WebDataset|\bgopen\b|xdecode",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_data_never_reaches(what):
    contender = (
        ROOT / "benchmarks"
    )  # measures webdataset's reader beside ours, on shards that it packed itself
    sources = [
        path for path in SOURCES if "webdataset" not in what or contender not in path.parents
    ]
    hits = [
        str(path.relative_to(ROOT))
        for path in sources
        if re.search(FORBIDDEN[what], path.read_text())
    ]
    assert not hits, f"{what} in {hits}"


def test_configuration_imports_neither_torch_nor_dali():
    code = (
        "import sys, fastmoco.config, fastmoco.recipes, fastmoco_pipelines.spec, fastmoco.cli.main;"
        "sys.exit(any(name.split('.')[0] in ('torch', 'nvidia') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_package_below_the_roots_is_installed():
    """`setup.py` finds packages by their `__init__.py`; one without would be missing from the wheel
    alone."""
    for package in PACKAGES:
        for folder in {path.parent for path in package.rglob("*.py")}:
            assert (folder / "__init__.py").exists(), (
                f"{folder.relative_to(ROOT)} has no __init__.py"
            )


def test_no_decision_hangs_on_the_wall_clock():
    """It jumps. Metrics, lines of the log for programs and torchrun's report are stamped with it,
    nothing is measured by it."""
    sources = [
        path
        for path in SOURCES
        if ROOT / "fastmoco" in path.parents and "time.time()" in path.read_text()
    ]
    assert {str(path.relative_to(ROOT)) for path in sources} == {
        "fastmoco/errors/log.py",
        "fastmoco/faults/first_cause.py",
        "fastmoco/telemetry/sinks.py",
        "fastmoco/telemetry/trackers/mlflow.py",
    }


def _imported(path: Path) -> set[str]:
    """Modules that a file imports, and the names it takes from modules, with dots."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    taken = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return plain | {f"{node.module}.{alias.name}" for node in taken for alias in node.names}


def test_collectives_are_in_two_rooms_alone():
    """import-linter sees torch as one package. What needs an answer of all ranks takes it from
    `distributed/agree.py`."""
    rooms = [ROOT / "fastmoco" / "distributed", ROOT / "fastmoco" / "checkpoint"]
    uses = {
        path
        for path in (ROOT / "fastmoco").rglob("*.py")
        if any(n.startswith("torch.distributed") for n in _imported(path))
    }
    attributes = {
        path
        for path in (ROOT / "fastmoco").rglob("*.py")
        if re.search(r"torch\.distributed\.\w+\(", path.read_text())
    }
    assert rooms[0] / "agree.py" in uses
    outside = sorted(
        str(path.relative_to(ROOT)) for path in uses | attributes if path.parent not in rooms
    )
    assert not outside, f"torch.distributed outside distributed/ and checkpoint/: {outside}"


def test_every_exception_from_a_security_rule_has_its_reason():
    """`# noqa: S603 - why`; of the tests too."""
    for path in (*SOURCES, *(ROOT / "tests").rglob("*.py")):
        for line in path.read_text().splitlines():
            assert not re.search(r"# noqa: [A-Z0-9, ]*S\d+[A-Z0-9, ]*$", line), f"{path}: {line}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_asserts_only_narrow_types(path):
    """`python -O` leaves them out, so nothing else may hang on them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            text = ast.unparse(node.test)
            form = r"(not )?isinstance\([\w.]+, [\w.]+\)|[\w.]+ is not None"
            assert re.fullmatch(form, text), text


def test_a_folder_of_the_name_of_a_mark_skips_no_test(request, monkeypatch):
    """Keywords of a test are also the names of the folders above it, as of a checkout `gpu`."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plain, marked = (
        pytest.Function.from_parent(request.node.parent, name=name, callobj=lambda: None)
        for name in ("plain", "marked")
    )
    plain.keywords["gpu"] = True
    marked.add_marker(pytest.mark.gpu)
    pytest_collection_modifyitems([plain, marked])
    assert [bool(item.get_closest_marker("skip")) for item in (plain, marked)] == [False, True]
