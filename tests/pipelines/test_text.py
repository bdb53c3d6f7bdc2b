"""Texts as they are shown: sentences of docstrings."""

from __future__ import annotations

import pytest

from fastmoco_pipelines.text import first_sentence


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("One line.", "One line."),
        ("One sentence over\n    two lines. Another.\n\n    More.\n    ", "One sentence over two lines."),
        ("76.7 % with 1.5e-4 in\nmain.py. More", "76.7 % with 1.5e-4 in main.py."),
        ("\n    Below the quotes.\n    ", "Below the quotes."),
        ("No full stop\n\nA paragraph.", "No full stop"),
        ("", ""),
        (None, ""),
    ],
)
def test_the_first_sentence_of_a_docstring(doc, sentence):
    assert first_sentence(doc) == sentence
