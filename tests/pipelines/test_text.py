"""Texts as they are shown: sentences of docstrings, URLs without their passwords."""

from __future__ import annotations

import pytest

from fastmoco_pipelines.text import (
    first_sentence,
    in_ascii,
    redact,
    shown,
    shown_lines,
    shown_word,
    spoken,
    without_secrets,
)


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("One line.", "One line."),
        (
            "One sentence over\n    two lines. Another.\n\n    More.\n    ",
            "One sentence over two lines.",
        ),
        ("76.7 % with 1.5e-4 in\nmain.py. More", "76.7 % with 1.5e-4 in main.py."),
        ("Of MAE (He et al. 2022), e.g. this. More.", "Of MAE (He et al. 2022), e.g. this."),
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


HIDDEN = {
    "https://u:SECRET@h/x?token=SECRET": "https://h/x",
    "--epochs https://u:SECRET@h/x?token=SECRET: must be": "--epochs https://h/x: must be",
    "--o=https://u:SECRET@h, b": "--o=https://h, b",
    "HTTPS://U:SECRET@h/x": "HTTPS://h/x",
    "ftp://u:SECRET@h and git+https://SECRET@h": "ftp://h and git+https://h",
    "{https://u:SECRET@a/x,https://b:SECRET@c/y}": "{https://a/x,https://c/y}",
    "https://h/x?next=https://u:SECRET@h": "https://h/x",
    # Within quotes, also as `repr`, JSON and a shell write them.
    "'https://u:p\\'SECRET@h/x?a=SECRET b': no": "'https://h/x': no",
    "x 'https://u:p'\"'\"'SECRET@h/x' y": "x 'https://h/x' y",
    '{"url": "https://u:SECRET@h/x?sig=SECRET"}': '{"url": "https://h/x"}',
    "b'https://u:SE\\x1bCRET@h/x'": "b'https://h/x'",
    # Not as URLs are written.
    "https://u:p SECRET@h/x: no": "https://h/x: no",
    "'https:/u:SECRET@h/x': no": "'https:/...': no",
    "https:\\\\u:SECRET@h/x": "https:\\\\...",
    "https%3A%2F%2Fu%3ASECRET%40h%2Fx rest": "https%3A%2F%2F... rest",
    "https%253a%252f%252fu%253ASECRET%2540h": "https%253a%252f%252f...",
    # Without a URL around them.
    "train u:SECRET@host/x": "train ...@host/x",
    "//u:SECRET@h/x": "//...@h/x",
    "a.tar?X-Amz-Signature=SECRET&b=1": "a.tar?X-Amz-Signature=...&b=1",
    "%3Ftoken%3DSECRET": "%3Ftoken%3D...",
    "{'Authorization': 'Basic SECRET'}": "{'Authorization': ...",
    "a header Bearer SECRET123": "a header Bearer ...",
    # Variables with their values.
    "HF_TOKEN=SECRET x": "HF_TOKEN=... x",
    "--o=AWS_SECRET_ACCESS_KEY='SECRET'": "--o=AWS_SECRET_ACCESS_KEY='...'",
    "aws_session_token = SECRET": "aws_session_token = ...",
    "WANDB_API_KEY=SECRET&x": "WANDB_API_KEY=...&x",
    "token " + "hf_" + "SECRET" * 6: "token hf_...",
}


@pytest.mark.parametrize("text", HIDDEN)
def test_no_secret_of_a_url_inside_a_text_is_shown(text):
    assert without_secrets(text) == HIDDEN[text]
    assert without_secrets(HIDDEN[text]) == HIDDEN[text]


def test_a_word_of_a_command_line_is_a_url_to_its_end():
    assert shown_word("--o=https://us er:SEC RET@h/x?token=SEC RET") == "--o=https://h/x"
    assert shown_word("a b@c") == "a b@c"


def test_a_long_word_of_a_command_line_is_shown_by_its_beginning():
    assert shown_word("x" * 1000) == "x" * 1000
    assert shown_word("x" * 131_000) == "x" * 1000 + "... (131,000 characters)"


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8443/x: 404 Not Found; https://h/a{1..3}.tar",
        "s3://bucket/x?y#z: gone",
        "keep_tokens='0.25@0,0.5@0.6', 196 tokens",
        "HF_TOKEN: tokens=3, key=a, hf_hub and https://h/hf_folder",
        "shards='data/a@b.tar', C:\\images, a/b:c@d.tar, recipe:/folder",
        "{https://h:1,https://i:2}/a@b.tar",
    ],
)
def test_a_text_without_a_secret_stays_as_it_is(text):
    assert shown(text) == text


@pytest.mark.parametrize(
    "part", ["a:b@", "://", "'https://", "https:/", "a.b-", "https://a:b ", "{", "&token", "%253a"]
)
def test_a_long_text_is_searched_in_linear_time(part):
    """With a time that grows with the square these would take hours, not tenths of a second."""
    assert without_secrets(part * (300_000 // len(part)))


def test_nothing_in_a_text_steers_a_terminal():
    text = "a\x1b[2J\x9b2J\r\x07\x08\u202eb\u2066c\u200bd\udce9\u2028\x85e\nf"
    assert shown(text, keep="\n") == (
        "a\\x1b[2J\\x9b2J\\r\\x07\\x08\\u202eb\\u2066c\\u200bd\\udce9\\u2028\\x85e\nf"
    )
    assert shown_lines("a\nfastmoco: forged\n  b https://u:SECRET@h") == (
        "a\\nfastmoco: forged\n  b https://h"
    )


@pytest.mark.parametrize("end", ["=", "@ ", "/x@y"])
def test_a_long_text_takes_no_longer_than_its_length(end: str) -> None:
    """A user might begin behind each comma: 200 kB took two minutes."""
    text = "a:b," * 50_000 + end
    assert shown(text) == text
