"""Links of the written pages lead somewhere, on a code host and in the site."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import IMAGE, LINK, ROOT, anchors, pages, prose

PAGES = pages()


def name(path):
    return str(path.relative_to(ROOT))


def leads(file, anchor):
    return not anchor or anchor in anchors(file.read_text())


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_to_files_and_headings_exist(path):
    broken = []
    text = prose(path.read_text())
    for link in [*LINK.findall(text), *IMAGE.findall(text)]:
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        inside = ROOT in (file, *file.parents)
        if not (inside and file.exists() and leads(file, anchor)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_to_other_servers_are_well_formed(path):
    """They are not followed: a test has no network."""
    links = re.findall(r"\((https?:[^)\s]*)\)", prose(path.read_text()))
    assert not [
        link
        for link in links
        if not re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[\w./#?=&%~+-]*)?", link)
    ]


def test_a_missing_file_and_a_missing_heading_are_found():
    text = "# A title\n\n## `feature_std` and its blind spot\n\n```text\n# no heading\n```\n"
    assert anchors(text) == {"a-title", "feature_std-and-its-blind-spot"}
    assert LINK.findall("[a](b.md#c) ![d](e.png) [`x` [y]](z)") == ["b.md#c", "z"]
    assert IMAGE.findall("![d](e.png)") == ["e.png"]
