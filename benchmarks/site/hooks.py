"""Hooks of mkdocs: pages made from the code, links to files outside docs/, and links from names of
recipes and commands to their pages.
"""

from __future__ import annotations

import html
import posixpath
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # mkdocs loads this file by its path
    sys.path.insert(0, str(ROOT))

from mkdocs.exceptions import PluginError  # noqa: E402 (after the path)
from mkdocs.structure.files import File, Files  # noqa: E402 (after the path)

from benchmarks.site import commands, recipes, references  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

SOURCES = {
    "fastmoco/README.md": "fastmoco: the trainer",
    "pipelines/README.md": "pipelines: images to batches",
    "kernels/README.md": "kernels: fused operations",
    "benchmarks/README.md": "benchmarks and instruments",
    "CONTRIBUTING.md": "Contributing",
    "CHANGELOG.md": "Changes",
}
"""Pages of the repository outside docs/ that the site has in any case, and their titles."""
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
"""A link of Markdown to another file, with its text and its anchor."""
FOREIGN = re.compile(
    r"""<(?:script|img|iframe|source|video|link(?![^>]*canonical))\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)
"""A part of a page that is loaded from another server."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the made pages into the navigation, in place of the words that stand for them."""

    written = {
        path.relative_to(config.docs_dir).as_posix(): path.read_text()
        for path in Path(config.docs_dir).rglob("*.md")
    }
    made: dict[str, list[Any]] = {
        "DECISIONS": sorted(path for path in written if path.startswith("decisions/")),
        "RECIPES": recipes.nav(),
        "COMMANDS": commands.nav(),
        "REFERENCE": references.nav(),
        "SOURCES": [
            {SOURCES[name]: target} if name in SOURCES else target
            for name, target in outside(written).items()
            if name.endswith(".md")
        ],
    }

    def filled(entry: Any) -> Any:
        if isinstance(entry, list):
            return [filled(one) for one in entry]
        if isinstance(entry, dict):
            return {title: filled(one) for title, one in entry.items()}
        return made.get(entry, entry)

    config.nav = filled(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages, and the files of the repository that pages link to."""
    written = {
        file.src_uri: Path(file.abs_src_path).read_text()
        for file in files.documentation_pages()
        if file.abs_src_path
    }
    for path, text in {
        **recipes.make(),
        **commands.make(written),
        **references.make(),
    }.items():
        files.append(File.generated(config, path, content=text))
    for name, target in outside(written).items():
        content = (ROOT / name).read_bytes()
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their copies in the site."""
    del config, files
    place = source_of(page.file.src_uri)

    def linked(found: re.Match[str]) -> str:
        name = repository_path(place, found[2])
        if name is None or (name.startswith("docs/") and place.startswith("docs/")):
            return found[0]
        target = target_of(name)
        if target is None:
            return found[1]
        here = posixpath.dirname(page.file.src_uri)
        return f"[{found[1]}]({posixpath.relpath(target, here or '.')}{found[3] or ''})"

    return LINK.sub(linked, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that a browser would load something for from another server.

    Raises:
        PluginError: naming the page and the address.
    """
    del config
    if found := FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri}: loads {found[1]} from another server")
    return output


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link names of recipes and commands in running text to their pages."""
    del config, files
    up = "../" * page.file.dest_uri.count("/")

    def linked(found: re.Match[str]) -> str:
        target = NAMED.get(html.unescape(found[1]))
        if target is None or target.partition("#")[0] == page.file.dest_uri:
            return found[0]
        return f'<a class="fm-name" href="{up}{target}">{found[0]}</a>'

    # Within links, headings and blocks of code a name stays as it is.
    parts = re.split(r"(<(a|pre|h[1-6])\b.*?</\2>)", content, flags=re.DOTALL)
    kept = [part for i, part in enumerate(parts) if i % 3 != 2]
    return "".join(
        part if i % 2 else re.sub(r"<code>([^<]+)</code>", linked, part)
        for i, part in enumerate(kept)
    )


NAMED = recipes.addresses() | commands.addresses()
"""The page of each name that is linked, from the root of the site."""


# --- files outside docs/


def source_of(page: str) -> str:
    """The file of the repository that a page shows; itself for a made page."""
    return page.removeprefix("source/") if page.startswith("source/") else f"docs/{page}"


def target_of(name: str) -> str | None:
    """Where the site has a file of the repository; None for a folder, which it has not."""
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return f"source/{name}" if (ROOT / name).is_file() else None


def repository_path(place: str, link: str) -> str | None:
    """The file of the repository that a link of a file leads to; None for another address."""
    if re.match(r"[a-z][a-z0-9+.-]*:|/", link):
        return None
    name = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
    return None if name.startswith("../") or not (ROOT / name).exists() else name


def outside(written: Mapping[str, str]) -> dict[str, str]:
    """The files outside docs/ that pages lead to, and where the site has them."""
    found = {name: f"source/{name}" for name in SOURCES}
    waiting = [(source_of(page), text) for page, text in written.items()]
    waiting += [(name, (ROOT / name).read_text()) for name in SOURCES]
    while waiting:
        place, text = waiting.pop()
        for link in LINK.finditer(text):
            name = repository_path(place, link[2])
            target = None if name is None else target_of(name)
            if name is None or target is None or name.startswith("docs/") or name in found:
                continue
            found[name] = target
            if name.endswith(".md"):
                waiting.append((name, (ROOT / name).read_text()))
    return found
