"""Texts as they are shown: sentences of docstrings, URLs without their passwords."""

from __future__ import annotations

import pytest

from fastmoco_pipelines.text import first_sentence, in_ascii, redact, spoken


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("One line.", "One line."),
        (
            "One sentence over\n    two lines. Another.\n\n    More.\n    ",
            "One sentence over two lines.",
        ),
        ("76.7 % with 1.5e-4 in\nmain.py. More", "76.7 % with 1.5e-4 in main.py."),
        ("\n    Below the quotes.\n    ", "Below the quotes."),
        ("No full stop\n\nA paragraph.", "No full stop"),
        ("", ""),
        (None, ""),
    ],
)
def test_the_first_sentence_of_a_docstring(doc, sentence):
    assert first_sentence(doc) == sentence


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:pa/SECRET@h/x", "https://..."),
        ("https:///u:SECRET@h", "https://..."),
        ("https://u:pa/SEC?RET@h/x", "https://..."),
        ("https://u:pa#SEC/RET@h/x", "https://..."),
        ("{https://v:q@h/a,https://u:pa/SECRET@i/b}", "{https://..."),
        ("{https://h,https://u:pa/SECRET@i}/b", "{https://..."),
    ],
)
def test_a_password_with_a_slash_or_without_a_host_is_hidden(url, shown):
    assert redact(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "https://host:8443/a@b.tar",
        "https://{a,b}.host/a@{1..3}.tar",
        "{http://h:1,https://i:2}/a@b.tar",
        "http://[::1]:80/a@b.tar",
        "file:///data/a@b.tar",
        "/data/a@b.tar",
        "s3://bucket/what?/a#b&c=d/größe.tar",
    ],
)
def test_an_at_sign_in_the_name_of_a_file_is_shown(url):
    assert redact(url) == url


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(30, "30 s"), (119, "119 s"), (240, "4 min"), (3 * 3600, "3 hours"), (90 * 86400, "90 days")],
)
def test_durations_in_their_largest_unit(seconds, words) -> None:
    assert spoken(seconds) == words


@pytest.mark.parametrize("query", ["?X-Amz-Signature=SECRET", "?a=b&access_token=SECRET"])
def test_a_signature_behind_a_key_is_hidden(query):
    assert redact(f"s3://bucket/a.tar{query}") == "s3://bucket/a.tar"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("K\u00e4fer [1].jpg", "K\\xe4fer [1].jpg"), ("\u732b.png", "\\u732b.png")],
)
def test_a_picture_shows_letters_that_its_font_lacks_as_escapes(name, shown):
    assert in_ascii(name) == shown
