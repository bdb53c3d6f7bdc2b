"""Every command of a page is run here, or read by the parser that would run it, or named below with
the reason why it is neither.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tyro", reason="tyro is not installed")

from fastmoco.cli import recipe_commands as with_recipe
from fastmoco.cli.commands import COMMANDS
from fastmoco.cli.main import main
from fastmoco.cli.words import prepare_words
from fastmoco.recipes import RECIPES
from tests.docs.pages import ROOT, TYPED, Typed, blocks, commands

SKIPPED = {
    r"python3 -m venv \.venv": "a new environment: .ci/run makes one by make",
    r"\. \.venv/bin/activate": "changes the shell that it is typed in",
    r"export \w+=.*": "changes the shell that it is typed in; names of variables are checked",
    r"cd \w+": "changes the shell that it is typed in",
    r"conda activate \w+": "changes the shell that it is typed in",
}
"""Commands that are neither run nor parsed, and why."""
FILLED_IN = {
    "YOUR_IMAGES": "photos",
    "HELD_OUT": "photos",
    "RUN": "runs/first",
    "RECIPE": "vit_nano8_e60_b256",
    "CASE": "ema",
    "FILE": "results.jsonl",
    "FOLDER": "runs/first",
    "launch/NAME.sh": "launch/single_gpu.sh",
    "IMAGES": "photos",
    "my.yaml": str(ROOT / "tests" / "docs" / "my.yaml"),
    "my.toml": "vit_s16_e300_b1024",
    "runs/first/config.json": "vit_nano8_e60_b256",
}
"""Words of pages that a reader replaces, and files of configs, which are read as the recipe in them."""
ELIDED = {
    "train": ["vit_nano8_e60_b256", "--data.images", "photos", "--out", "runs/first"],
}
"""What `...` stands for, where it is missing."""
RUN = (
    "recipes",
    "runs",
    "print-config",
    "data stats",
    "data views",
    "data sample",
    "checkpoint list",
    "checkpoint verify",
    "checkpoint consolidate",
    "curves",
    "eval embed",
    "eval outliers",
    "eval neighbours",
    "run images",
)
"""Commands that are cheap enough to be run on a small set and a run of a few steps; at most once with
the same words."""
RUN_LONG = ("data check", "data index", "data pack", "eval knn")
"""Those that `make long` runs."""
ABSENT = ("checkpoint_0299.pth.tar", "deit_small.pth", "1207", "--continue", "step.png")
"""Files, steps and states that a page names and that the small run has not: such commands are parsed."""
REFUSED = {"train --data.images photos": 2}
"""Exit codes other than 0: without a recipe `train` names the whole command."""


def filled(words: list[str]) -> list[str]:
    """A command with a reader's words in place of those that a page leaves open."""
    words = words[: words.index(">")] if ">" in words else words
    plain = [word.strip("[]") for word in words]
    plain = [FILLED_IN.get(word, word.replace("YOUR_IMAGES", "photos")) for word in plain]
    plain = [re.sub(r"^/data/|^shards/", "data/", word) for word in plain]
    at = plain.index("...") if "..." in plain else 0
    if at and plain[at - 1].startswith("--data.shards"):
        plain[at] = "data/train-*.tar"
    elif at:
        plain.remove("...")
        verb = plain[1] if len(plain) > 1 else ""
        recipe, *options = ELIDED[verb]
        if len(plain) < 3 or plain[2] not in RECIPES:
            plain.insert(2, recipe)
        for flag, value in zip(options[::2], options[1::2], strict=True):
            if flag not in plain and not (flag == "--data.images" and "--data.shards" in plain):
                plain += [flag, value]
    return plain


def verb_of(words: list[str]) -> str:
    """The command of fastmoco that words begin with."""
    return next((w for n in (2, 1) if (w := " ".join(words[:n])) in COMMANDS), "")


def treatment(command: Typed) -> str:
    """`run`, `long`, `parsed` or `skipped`."""
    if any(re.fullmatch(pattern, command.text) for pattern in SKIPPED):
        return "skipped"
    words = filled(command.words)
    if words[0] != "fastmoco" or any(word in ABSENT for word in words):
        return "parsed"
    if " ".join(words[1:]) in REFUSED:
        return "run"
    verb = verb_of(words[1:])
    return "run" if verb in RUN else "long" if verb in RUN_LONG else "parsed"


ALL = commands()
TREATED = {command: treatment(command) for command in ALL}


def of(*kinds):
    """The commands with a treatment, each text once, as parameters of a test."""
    found = {" ".join(filled(c.words)): c for c in reversed(ALL) if TREATED[c] in kinds}
    ordered = sorted(found.values(), key=ALL.index)
    return pytest.mark.parametrize("command", ordered, ids=lambda c: f"{c.page}:{c.line}")


def test_every_command_has_a_treatment_and_most_are_run_or_parsed():
    counts = Counter(TREATED.values())
    print(f"{len(ALL)} commands: {dict(counts)}")
    assert counts["skipped"] <= 0.15 * len(ALL)


def test_no_block_of_commands_is_called_a_text():
    for block in blocks():
        where = f"{block.page}:{block.line}"
        assert block.language in ("bash", "python", "text", "json", "yaml", "toml"), where
        if block.language == "text":
            assert not TYPED.match(block.text.splitlines()[0]), where


# --- what other programs read


def read_by_another_program(words: list[str]) -> None:
    """Check the words of a command that is none of fastmoco's own.

    Raises:
        AssertionError: if a target, an extra, a module, a script or an option does not exist.
    """
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert next(word for word in rest if "=" not in word) in targets
    elif program == "pip":
        read_by_pip(rest)
    elif program in ("sbatch", "srun") or program.startswith("launch/"):
        read_by_a_script(program, rest)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(rest)
        assert found.module
        assert found.training_script == "fastmoco"
        parse_own(found.training_script_args)
    elif program in ("python", "python3") and rest[0] == "-m":
        read_by_a_module(rest[1], rest[2:])
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "-c", "exec")
    elif program == "docker":
        assert (ROOT / "Dockerfile").exists()
        if rest[0] == "run":
            parse_own(rest[rest.index("fastmoco") + 1 :])  # after the image
    elif program == "conda":
        assert (ROOT / rest[rest.index("-f") + 1]).exists()
    elif "=" in program:
        read_by_another_program(rest)
    else:
        raise AssertionError(f"{program}: which program is this?")


def read_by_pip(words: list[str]) -> None:
    """Not in this process: once pip is imported setuptools cannot be, and torch's compiler needs it."""
    assert words[0] == "install"
    code = (
        "import sys; from pip._internal.commands import create_command;"
        "print(*create_command('install').parse_args(sys.argv[1:])[1], sep='\\n')"
    )
    parser = [sys.executable, "-c", code, *words[1:]]
    found = subprocess.run(parser, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    names = found.stdout.splitlines()
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for extra in re.findall(r"(?:\.|fastmoco)\[([\w,-]+)\]", " ".join(names)):
        for name in extra.split(","):
            assert re.search(rf"^{name} = \[", extras, re.MULTILINE), name


def read_by_a_script(program: str, words: list[str]) -> None:
    if program in ("sbatch", "srun"):
        at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
        program, words = words[at], words[at + 1 :]
    assert (ROOT / program).stat().st_mode & 0o111
    recipe = [] if words and words[0] in RECIPES else ["vit_nano8_e60_b256"]
    parse_own(["train", *recipe, *words])


def read_by_a_module(module: str, words: list[str]) -> None:
    if module == "fastmoco":
        parse_own(words)
    elif module == "pytest":
        assert all((ROOT / word).exists() for word in words if "/" in word)
    elif module == "benchmarks":
        from benchmarks import command

        with pytest.raises(SystemExit) as ended:
            command.main([words[0], "--help"])
        assert ended.value.code == 0
        if words[0] == "run" and "--all" not in words:
            from benchmarks.registry import CASES

            options = [w.partition("=")[0] for w in words[2:] if "=" in w and w[0] not in "-'"]
            assert set(options) <= {*CASES[words[1]].defaults, "option"}, words
    elif module == "mkdocs":
        from mkdocs.__main__ import cli

        assert words[0] in cli.commands
    else:
        assert module.startswith("benchmarks.")
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


# --- what fastmoco reads


def parse_own(words: list[str]) -> None:
    """Read a command of fastmoco by its own parser, without doing what it says.

    Raises:
        AssertionError: with what the parser says if it refuses.
    """
    words = prepare_words(filled(["fastmoco", *words])[1:])
    if words[0] == "--version" or {"help", "--help", "--help-all"} & set(words):
        assert main(words) == 0
        return
    verb = verb_of(words)
    assert verb, f"unknown command {words}"
    rest = words[len(verb.split()) :]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = parsed_with_recipe(verb, rest) if verb in KINDS else parsed(verb, rest)
        except SystemExit as stop:
            code = stop.code
    assert code == 0, said.getvalue()


KINDS = {
    "train": with_recipe.TrainArguments,
    "print-config": with_recipe.ConfigArguments,
    "plan": with_recipe.PlanArguments,
    "profile": with_recipe.ProfileArguments,
    "tune": with_recipe.TuneArguments,
}


def parsed_with_recipe(verb: str, words: list[str]) -> int:
    return 0 if with_recipe.parse_config(KINDS[verb], verb, words) is not None else 2


def parsed(verb: str, words: list[str]) -> int:
    """Parse a command whose options are those of a function, with one that does nothing."""
    command = COMMANDS[verb]
    assert not command.reads_words, verb
    function = command.call

    @functools.wraps(function)
    def nothing(*_values, **_named):
        return 0

    command.__dict__["call"] = nothing
    try:
        return main([*verb.split(), *words])
    finally:
        command.__dict__["call"] = function


@of("parsed", "long")
def test_a_command_is_read_by_its_parser(command, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    words = filled(command.words)
    if words[0] == "fastmoco":
        parse_own(words[1:])
    else:
        read_by_another_program(words)


@pytest.mark.parametrize(
    "words",
    [
        ["make", "everything"],
        ["pip", "install", ".[wings]"],
        ["torchrun", "--nproc-per-node", "8", "-m", "fastmoco", "train", "vit_x", "--out", "r"],
        ["launch/absent.sh"],
        ["python", "-m", "benchmarks.absent"],
        ["python", "-m", "benchmarks", "run", "ema", "wings=2"],
    ],
)
def test_a_command_that_does_not_exist_is_found(words):
    with pytest.raises((AssertionError, FileNotFoundError, KeyError)):
        read_by_another_program(words)


def test_an_option_that_does_not_exist_is_found():
    for words in (["train", "digits_drop50", "--wings"], ["data", "check", "a", "--wings"]):
        with pytest.raises(AssertionError, match="unknown option"):
            parse_own(words)


def test_variables_that_pages_export_are_read_somewhere():
    known = " ".join(
        path.read_text()
        for folder in ("fastmoco", "pipelines", "kernels", "launch", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh")
    )
    of_others = {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NCCL_SOCKET_IFNAME"}
    named = {n for c in ALL if c.words[0] == "export" for n in re.findall(r"([A-Za-z_]+)=", c.text)}
    assert not [name for name in named - of_others if name not in known]


# --- what is run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what pages speak of: photos/ in three classes, packed sets in data/, and a run of
    a few steps in runs/first and quickstart/run.
    """
    root = tmp_path_factory.mktemp("pages")
    draws = np.random.default_rng(0)
    for name, waves in (("bird", 0.2), ("cat", 0.5), ("dog", 0.9)):
        for i in range(24):
            path = root / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            y, x = np.mgrid[:40, :40]
            angle = draws.uniform(0, np.pi)
            wave = 128 + 100 * np.sin(waves * (x * np.cos(angle) + y * np.sin(angle)))
            levels = wave[..., None] * draws.uniform(0.4, 1, 3)
            Image.fromarray(levels.astype(np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        stay_in(root, patch)
        for prefix in ("train", "test"):
            assert main(["data", "pack", "photos", "data", "--prefix", prefix]) == 0
        train = "train vit_nano8_e60_b256 --data.shards data/train-*.tar --out runs/first"
        few = "--knn.test-shards data/test-*.tar --global-batch-size 32 --epochs 2 --device cpu"
        assert main([*train.split(), *few.split(), "--threads", "1"]) == 0
    (root / "quickstart").mkdir()
    for link, target in (("data", "data"), ("run", "runs/first")):
        (root / "quickstart" / link).symlink_to(root / target)
    return root


def stay_in(root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(root)
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    patch.setenv("COLUMNS", "100")


def require_run(command: Typed, place: Path, patch: pytest.MonkeyPatch) -> None:
    stay_in(place, patch)
    words = filled(command.words)[1:]
    out = {"data pack": 3, "data sample": 3}.get(verb_of(words))
    if out is not None:  # packing again into the same place is refused
        words[out] = f"made/{command.line}"
        shutil.rmtree(place / "made", ignore_errors=True)
    for flag, value in pairwise(words):
        if flag == "--out" and (place / value).is_file():  # of another page
            (place / value).unlink()
    code = main(words)
    assert code == REFUSED.get(" ".join(words), 0)
    for flag, value in pairwise(words):
        if flag == "--out" and code == 0:
            assert (place / value).exists(), value


@of("run")
def test_a_command_runs(command, place, monkeypatch):
    require_run(command, place, monkeypatch)


@pytest.mark.long
@of("long")
def test_a_slower_command_runs(command, place, monkeypatch):
    require_run(command, place, monkeypatch)


def test_the_objective_and_the_store_of_the_guides_work():
    """Their blocks of Python as they stand. The version of a file is the same in every process."""
    pages = ("docs/add_an_objective.md", "docs/add_a_store.md")
    texts = [b.text for b in blocks() if b.page in pages and b.language == "python"]
    assert len(texts) == 2
    read = """
store = MemoryStore({"set/a.tar": b"abcdef"})
assert store.find("memory://set/*.tar", None) == ["memory://set/a.tar"]
some = dict(url="memory://set/a.tar", start=2, stop=4, limits=None, deadline=0)
with store.open(Request(**some)) as body:
    print(b"".join(body.chunks), body.validator)
with store.open(Request(**some, validator="of another version")) as body:
    assert (body.start, b"".join(body.chunks)) == (0, b"abcd")
"""
    code = "\n".join([*texts, read])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loss, content = done.stdout.splitlines()
    assert float(loss.split()[0]) > 0
    assert content == f"b'cd' {hashlib.sha256(b'abcdef').hexdigest()}"


@pytest.mark.long
def test_the_page_on_own_images_as_it_is_typed(tmp_path, monkeypatch):
    """All of it after the installation, in its order, on more images than a batch."""
    draws = np.random.default_rng(1)
    for name, waves in (("cat", 0.2), ("dog", 0.9)):
        for i in range(150):
            path = tmp_path / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            y, x = np.mgrid[:32, :32]
            wave = 128 + 100 * np.sin(waves * (x + i * y / 150))
            levels = wave[..., None] * draws.uniform(0.4, 1, 3)
            Image.fromarray(levels.astype(np.uint8)).save(path)
    stay_in(tmp_path, monkeypatch)
    own = [c for c in ALL if c.page == "docs/own_images.md" and TREATED[c] != "skipped"]
    typed = [c for c in own if c.words[0] == "fastmoco"]
    assert len(typed) >= 9
    for command in typed:
        words = command.words[1:]
        assert main(words) == REFUSED.get(" ".join(words), 0), command.text
    for name in ("views.png", "near.png", "odd.png", "encoder.safetensors", "features.npz"):
        assert (tmp_path / name).exists()
    (block,) = [b for b in blocks() if b.page == "docs/own_images.md" and b.language == "python"]
    done = subprocess.run(
        [sys.executable, "-c", block.text],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"\(300, \d+\) \w+/\d+\.png", done.stdout)
