"""The pages of the site that are made from the code, and its hooks."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed")
pytest.importorskip("griffe", reason="mkdocstrings is not installed")
pytest.importorskip("tyro", reason="tyro is not installed")

from benchmarks.plot import lines_of
from benchmarks.site import charts, commands, docstrings, hooks, recipes, references
from fastmoco.cli.commands import COMMANDS
from fastmoco.recipes import EXPECTED, RECIPES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages():
    return recipes.make()


def section(pages, name):
    page = next(text for text in pages.values() if f"## {name} {{" in text)
    return page.partition(f"## {name} {{")[2].partition("\n## ")[0]


def test_every_recipe_has_a_section_with_its_numbers_and_schedule(pages):
    for name in RECIPES:
        text = section(pages, name)
        assert f"fastmoco train {name} " in text
        assert "learning rate" in text
        assert "<svg" in text
        assert str(EXPECTED[name]) in text if name in EXPECTED else "**Published.**" not in text


def test_results_of_a_recipe_are_those_that_are_committed(pages):
    method = lines_of()["methods"][0]["result"]["methods"]["byol"]
    text = section(pages, "byol_nano7_e12_b256")
    assert f"{100 * method['start']['mean']:.1f} %" in text
    assert f"{100 * method['by_seconds']['mean']:.1f} %" in text
    measured = text.partition("Measured on Fashion-MNIST")[2]
    (knn,) = re.findall(r'aria-label="kNN accuracy, %">(.*?)</svg>', measured)
    assert knn.count('class="c c') == len(method["curves"])
    assert "No result is committed" in section(pages, "byol_vit_b16_e300_b4096")


def test_the_loss_of_knowing_nothing_is_that_of_the_objective(pages):
    assert "| 6.654 |" in section(pages, "vit_s16_e300_b4096")
    assert "knows nothing" not in section(pages, "mae_vit_b16_e800_b4096")


def test_a_module_of_recipes_without_a_title_is_named(monkeypatch):
    monkeypatch.delitem(recipes.TITLES, "byol")
    with pytest.raises(KeyError, match="TITLES lacks byol"):
        recipes.groups()


def test_a_curve_goes_through_its_points():
    panel = charts.Panel("t", "x", {"a": [(0, 1), (5, 4), (10, 2)]})
    drawn = charts.figure([panel], "a < b")
    (path,) = re.findall(r'class="c c0" d="M([^"]*)"', drawn)
    found = [tuple(map(float, point.split())) for point in path.split("L")]
    left, right, low, high = 46.0, 340 - 12.0, 190 - 34.0, 26.0
    heights = [low - (low - high) * (y - 1) / 3 for y in (1, 4, 2)]
    assert [x for x, _ in found] == [left, (left + right) / 2, right]
    assert [y for _, y in found] == pytest.approx(heights, abs=0.06)
    assert "a &lt; b" in drawn


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.64, 0.76, [0.65, 0.675, 0.7, 0.725, 0.75]), (2, 2, [2])],
)
def test_ticks_are_round(low, high, found):
    assert charts.ticks(low, high) == pytest.approx(found)


def test_every_command_has_a_page_with_its_help_and_where_it_is_used():
    written = {"guide.md": "# A guide\n\n```bash\nfastmoco curves runs/first  # now\n```\n"}
    made = commands.make(written)
    assert set(made) == {"commands/index.md", *map(commands.path_of, COMMANDS)}
    for name in COMMANDS:
        text = made[commands.path_of(name)]
        assert "usage: fastmoco" in text or name == "recipes"
    assert (
        "[A guide](../guide.md):\n\n```bash\nfastmoco curves runs/first\n```"
        in (made["commands/curves.md"])
    )


@pytest.mark.parametrize("page", references.REFERENCES, ids=lambda page: page.module)
def test_the_reference_has_what_a_module_exports(page):
    module = importlib.import_module(page.module)
    names = references.public_names(page.module, page.names)
    assert names
    exported = list(page.names) or getattr(module, "__all__", None)
    if exported is not None:
        assert [name.rpartition(".")[2] for name in names] == list(exported)
    for name in names:
        home, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(home), attribute), name


def test_the_reference_has_what_the_pages_import():
    def named(full):
        home, _, name = full.rpartition(".")
        return getattr(importlib.import_module(home), name)

    documented = [
        named(full)
        for page in references.REFERENCES
        for full in references.public_names(page.module, page.names)
    ]
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("*/README.md")]
    imports = {
        (module, name)
        for page in pages
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for node in ast.walk(ast.parse(textwrap.dedent(block)))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fastmoco")
        for module, name in ((node.module, alias.name) for alias in node.names)
    }
    lacks = [
        full
        for full in (f"{module}.{name}" for module, name in sorted(imports))
        if all(page.module != full for page in references.REFERENCES)
        and not any(named(full) is one for one in documented)
    ]
    assert len(imports) > 20
    assert lacks == []


def test_a_name_that_a_module_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"fastmoco\.optim does not define wings"):
        references.public_names("fastmoco.optim", ("wings",))


def test_links_out_of_docs_lead_to_copies():
    written = {"a.md": "[x](../benchmarks/README.md#y) [z](../launch) [d](data.md) [w](https://h/)"}
    found = hooks.outside(written)
    assert found["benchmarks/README.md"] == "source/benchmarks/README.md"
    assert "benchmarks/results/README.md" in found  # which that one names
    assert "launch" not in found
    assert hooks.repository_path("docs/a.md", "https://h/") is None
    assert hooks.repository_path("docs/a.md", "../../etc/passwd") is None
    assert hooks.repository_path("docs/a.md", "../absent.md") is None


class Page:
    """What hooks read of a page."""

    def __init__(self, source: str) -> None:
        self.file = type("F", (), {"src_uri": source, "dest_uri": source.replace(".md", ".html")})


def test_links_are_rewritten_from_where_the_page_is():
    page = Page("methods.md")
    text = hooks.on_page_markdown("[x](../kernels/README.md#y), [z](../launch)", page, None, None)
    assert text == "[x](source/kernels/README.md#y), z"
    page = Page("source/kernels/README.md")
    text = hooks.on_page_markdown(
        "[ops](../docs/ops.md) [p](../pipelines/README.md)", page, None, None
    )
    assert text == "[ops](../../ops.md) [p](../pipelines/README.md)"


def test_names_of_recipes_and_commands_become_links():
    content = (
        "<h2><code>digits_drop50</code></h2><p><code>digits_drop50</code> <code>data pack</code></p>"
        '<pre><code>digits_drop50</code></pre><a href="x"><code>digits_drop50</code></a>'
    )
    text = hooks.on_page_content(content, Page("troubleshooting/a.md"), None, None)
    recipe = '<a class="fm-name" href="../recipes/token_dropping.html#digits_drop50">'
    command = '<a class="fm-name" href="../commands/data_pack.html">'
    assert text == content.replace(
        "<p><code>digits_drop50</code> <code>data pack</code>",
        f"<p>{recipe}<code>digits_drop50</code></a> {command}<code>data pack</code></a>",
    )


@pytest.mark.parametrize(
    ("html", "refused"),
    [
        ('<script src="https://cdn.example/x.js">', True),
        ('<link rel="stylesheet" href="//fonts.example/f.css">', True),
        ('<img alt="a" src=http://h/i.png>', True),
        ('<a href="https://h/">', False),
        ('<link href="assets/site.css" rel="stylesheet">', False),
    ],
)
def test_a_page_that_loads_from_another_server_is_refused(html, refused):
    if refused:
        with pytest.raises(hooks.PluginError, match=r"a\.md: loads"):
            hooks.on_post_page(html, Page("a.md"), None)
    else:
        assert hooks.on_post_page(html, Page("a.md"), None) == html


def test_titled_paragraphs_of_a_docstring_stay_paragraphs():
    entries = "Args:\n    x: a number\n        or two.\n\nRaises:\n    ValueError: if it\n        fails.\n"
    text = f"Do it.\n\nNumerics: exact,\n    always.\n\n{entries}"
    assert docstrings.plain(text) == text.replace("    always", "always")
