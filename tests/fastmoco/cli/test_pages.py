"""Help pages: what they hold, how long they are, and that they name every option of the parser."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="tyro is not installed")

import tyro

from fastmoco.cli.commands import COMMANDS, GROUPS
from fastmoco.cli.options import describe
from fastmoco.cli.recipe_commands import TrainArguments
from fastmoco.recipes import RECIPES, get_recipe
from tests.command_line import main

SCREEN = 50
RECIPE_COMMANDS = ("train", "print-config", "plan", "profile", "tune")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def page(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_overview_fits_on_a_screen_and_is_aligned(words, capsys):
    lines = page(capsys, *words).splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if line.startswith("  ")]
    split = [re.fullmatch(r"  (\S+(?: \S+)?)(  +)(\S.*\.)", row) for row in rows]
    assert all(split)
    assert [row[1] for row in split] == list(COMMANDS)
    assert len({row.start(3) for row in split}) == 1
    assert [line for line in lines if line in GROUPS] == list(GROUPS)


@pytest.mark.parametrize("words", [("data",), ("data", "--help"), ("help", "data")])
def test_a_group_lists_its_commands_alone(words, capsys):
    text = page(capsys, *words)
    assert "data pack  " in text
    assert "checkpoint" not in text


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in (*RECIPE_COMMANDS, "recipes")])
def test_each_command_has_a_page(name, capsys):
    text = page(capsys, *name.split(), "--help")
    assert text.startswith(f"usage: fastmoco {name}")
    assert text == page(capsys, "help", *name.split())
    assert len(text.splitlines()) <= SCREEN


@pytest.mark.parametrize("verb", RECIPE_COMMANDS)
def test_help_without_a_recipe_says_what_one_is(verb, capsys):
    text = page(capsys, verb, "--help")
    assert "A recipe is" in text
    assert not [recipe for recipe in RECIPES if f"  {recipe}" not in text]
    assert len(text.splitlines()) <= 2 * SCREEN
    assert f"{verb} RECIPE --help-all" in text


@pytest.mark.parametrize("verb", RECIPE_COMMANDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_a_recipe_is_two_screens(verb, recipe, capsys):
    text = page(capsys, verb, recipe, "--help")
    assert len(text.splitlines()) <= 2 * SCREEN
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("crop-scale") == 1  # views are described once
    if verb == "train":
        required = text.partition("Required\n")[2].partition("\n\n")[0]
        flags = re.findall(r"^  (--[\w.-]+) \w+", required, re.MULTILINE)
        assert flags == ["--out", "--data.images", "--data.shards"]
        assert required.count("(required") == 3
        assert re.search(r"\(--data\.images STR \|\s+--data\.shards STR\)", text)


def test_the_whole_help_describes_every_option_once(capsys):
    text = page(capsys, "train", "quickstart_digits", "--help-all")
    described = describe(TrainArguments, defaults("quickstart_digits"))
    for option in described.options:
        views = re.fullmatch(r"--data\.view\d\.(.*)", option.flag)
        name = f"  *.{views[1]} " if views else f"  {option.flag}"
        assert (
            len(
                re.findall(
                    rf"^{re.escape(name)}\b" if not views else rf"^{re.escape(name)}",
                    text,
                    re.MULTILINE,
                )
            )
            >= 1
        ), option.flag
    assert "(default 8)" in text  # size of both views
    for group in described.groups[1:]:
        assert f"--{group.name.replace('_', '-')}.*" in text


def test_a_default_that_differs_between_views_is_named(capsys):
    text = " ".join(page(capsys, "train", "vit_s16_e300_b4096", "--help-all").split())
    assert "Probability of a Gaussian blur. (default 1; view2: 0.1)" in text


def defaults(recipe):
    return TrainArguments(out=tyro.MISSING, config=get_recipe(recipe))


def flags_of_parser(target, default=None):
    """The options on tyro's own page."""
    given = {} if default is None else {"default": default}
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(target, args=["--help"], **given)
    return set(re.findall(r"(?<=[\s|│])--[a-z][\w.-]*(?![\w.-])", text.getvalue()))


@pytest.mark.parametrize("recipe", ["vit_s16_e300_b4096", "byol_digits"])
def test_the_options_of_a_recipe_are_those_of_the_parser(recipe):
    default = defaults(recipe)
    flags = set(describe(TrainArguments, default).by_flag())
    assert flags == flags_of_parser(TrainArguments, default) - {"--help"}


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if not c.reads_words])
def test_the_options_of_a_command_are_those_of_the_parser(name):
    function = COMMANDS[name].call
    described = describe(function)
    flags = set(described.by_flag())
    assert flags <= flags_of_parser(function)
    others = {"--help", "--out", "--out."}  # also in its texts
    assert flags_of_parser(function) - flags <= others
    assert not [option.name for option in described.options if not option.help]


def test_a_pipe_gets_no_color_and_the_width_follows_the_terminal(capsys, monkeypatch):
    wide = page(capsys, "train", "--help")
    monkeypatch.setenv("COLUMNS", "60")
    narrow = page(capsys, "train", "--help")
    assert "\033" not in wide
    assert len(narrow.splitlines()) > len(wide.splitlines())
    prose = [line for line in narrow.splitlines() if not line.startswith("  --")]
    assert max(map(len, prose)) <= 60


@pytest.mark.parametrize(
    ("variable", "bold"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_headings_are_bold_on_a_terminal_only(variable, bold, monkeypatch):
    from fastmoco.cli import pages

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pages.sys.stdout, "isatty", lambda: True, raising=False)
    assert ("\033[1m" in pages.heading("Train")) == bold


@pytest.mark.parametrize(
    ("words", "reader", "begin"),
    [
        ("train quickstart_digits --help-all", "head -1", "usage:"),
        ("print-config quickstart_digits", "true", ""),
    ],
)
def test_a_page_into_a_pipe_that_ends_early_is_no_error(words, reader, begin):
    root = Path(__file__).parents[3]
    command = f"{sys.executable} -m fastmoco {words} | {reader}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert done.stderr == ""
    assert done.stdout.startswith(begin)
    assert done.returncode == 0


def test_help_is_the_same_without_docstrings():
    """`python -OO` leaves them out: each page reads them from the source then."""
    script = """
import contextlib, io, sys
sys.argv = ["fastmoco"]
from fastmoco.cli.main import main
pages = [["--help"], ["recipes"], ["train", "--help"], ["plan", "swav_digits", "--help"],
         ["data", "views", "--help"], ["data", "pack", "--help"], ["data", "check", "--help-all"]]
print([main(words) for words in pages], sys.flags.optimize)
"""
    texts = [
        subprocess.run(
            [sys.executable, *flags, "-c", script],
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for flags in ([], ["-OO"])
    ]
    assert texts[0].endswith("] 0\n")
    assert texts[1] == texts[0].removesuffix("0\n") + "2\n"
