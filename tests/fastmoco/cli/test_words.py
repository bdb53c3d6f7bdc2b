"""Words of a command line as a shell passes them on: expanded globs, `~`, variables; and names of
any bytes on the way back."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.cli.words import prepare_words
from tests.command_line import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with shards of two sets, and a home beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here" / "data").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    for name in ("train-000000", "train-000001", "train-000002", "test-000000", "test-000001"):
        for end in (".tar", ".tar.index"):
            Path(f"data/{name}{end}").touch()
    Path("data/manifest.json").touch()
    return tmp_path


def expand(*words: str) -> list[str]:
    """What bash makes of words without quotes."""
    script = f"printf '%s\\0' {' '.join(words)}"
    return subprocess.check_output(["bash", "-c", script], text=True).split("\0")[:-1]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("data check data/train-*.tar", "data check data/train-*.tar"),
        ("data check data/train-*", "data check data/train-*.tar"),
        ("data check data/*.tar --show 3", "data check data/*.tar --show 3"),
        ("data check data/*", "data check data/*.tar"),
        ("data index data/train-00000[01].tar", "data index data/train-{000000..000001}.tar"),
        ("data stats data/train-00000[02].tar", "data stats data/train-{000000,000002}.tar"),
        ("data stats data/train-000000.tar", "data stats data/train-000000.tar"),
        (
            "train R --data.shards data/train-*.tar --out runs/x",
            "train R --data.shards data/train-*.tar --out runs/x",
        ),
        (
            "eval knn RUN --train data/train-*.tar --test data/test-*.tar --k 3",
            "eval knn RUN --train data/train-*.tar --test data/test-*.tar --k 3",
        ),
        ("train R --data.shards=data/train-*.tar", "train R --data.shards=data/train-*.tar"),
        ("recipes", "recipes"),
        ("data index --salvage data/train-*", "data index --salvage data/train-*.tar"),
        (
            "data check --json data/manifest.json data/test-*",
            "data check --json data/manifest.json data/test-*.tar",
        ),
    ],
)
def test_a_pattern_that_a_shell_has_expanded_is_one_again(here, typed, meant):
    assert prepare_words(expand(*typed.split())) == meant.split()


def test_thousands_of_shards_are_one_short_pattern(here):
    names = [f"data/many-{i:06d}.tar" for i in range(1000)]
    for name in names:
        Path(name).touch()
    assert prepare_words(["data", "check", *names]) == ["data", "check", "data/many-*.tar"]
    odd = names[::2]
    (word,) = prepare_words(["data", "check", *odd])[2:]
    assert word.startswith("data/many-{000000,000002,")
    urls = [f"https://host/a-{i}.tar?token=x" for i in range(3)]
    assert prepare_words(["data", "check", *urls])[2:] == ["{" + ",".join(urls) + "}"]


@pytest.mark.parametrize(
    ("typed", "error"),
    [
        ("data check data/*", "'data/readme.md': is no shard, but among 11 words"),
        ("data check pictures/*", "data check takes one pattern, not 2 names"),
        ("data pack pictures/* out", r"e\.g\. fastmoco data pack pictures out"),
        ("data stats data/train-000000.tar pictures", "data stats takes one pattern, not 2"),
        ("data check https://h/a,b.tar https://h/c.tar", "cannot be one pattern"),
        ("data check '$HOME/data/*.tar'", r"'\$HOME/data/\*\.tar': there is nothing of this name"),
        ("train R '--out=${RUNS}/x'", r"\$\{RUNS\} in single quotes, but in double quotes"),
        ("data pack pictures '~nobody_here/x'", "is the home folder of no user"),
        ("data pack pictures ''", "data pack: an empty name"),
        (f"data check --{'x' * 300}=1", r"xxx\.\.\.: is no option: a name has no 302 characters"),
    ],
)
def test_words_that_make_no_sense_are_refused(here, capsys, typed, error):
    Path("data/readme.md").touch()
    Path("pictures").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Path("pictures", name).touch()
    words = expand(*typed.split())
    with pytest.raises(ValueError, match=error):
        prepare_words(words)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(error, printed.err)
    assert not [name for name in os.listdir() if name not in ("data", "pictures")]


@pytest.mark.parametrize("word", ["{}", "--out={}", "--json={}"])
def test_a_quoted_home_is_the_home(here, word):
    home = here / "home"
    for typed, meant in (("~", home), ("~/x y/*.tar", home / "x y/*.tar"), ("~root", "/root")):
        assert prepare_words([word.format(typed)]) == [word.format(meant)]
    url = word.format("https://host/~user/$x/a.tar")
    assert prepare_words([url]) == [url]
    Path("~/old").mkdir(parents=True)  # what exists is taken as it is
    Path("$HOME").mkdir()
    for typed in ("~/old", "~/old/x", "$HOME/x"):
        assert prepare_words([word.format(typed)]) == [word.format(typed)]


def picture(seed: int) -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "JPEG")
    return out.getvalue()


def fastmoco(words: list[str | bytes], **environment: str) -> tuple[int, bytes]:
    pytest.importorskip("tyro", reason="tyro is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "fastmoco", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        check=False,
    )
    return done.returncode, done.stdout


NAMES = [
    b"na\xefve",  # Latin-1
    b"\x1b[2J\nall is well\r",
    "\u202egpj".encode(),
    "\u732b".encode(),
    b" -rf",
]


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["utf-8", "ascii"],
)
def test_names_of_any_bytes_are_printed_escaped_whatever_the_encoding(tmp_path, environment):
    src = os.fsencode(tmp_path) + b"/src"
    for number, name in enumerate(NAMES):
        os.makedirs(src + b"/" + name)
        for i in range(2):
            with open(src + b"/" + name + b"/" + name + b"%d.jpg" % i, "wb") as file:
                file.write(picture(number) if i else b"no picture")
    out = os.fsencode(tmp_path) + b"/out" + NAMES[0] + NAMES[1]
    code, text = fastmoco([b"data", b"pack", src, out], **environment)
    assert code == 0, text
    assert b"5 images, 5 classes, 1 shard, 0.0 MB, 5 skipped" in text
    assert b"na\\udcefve" in text
    assert b"\\x1b[2J\\nall is well\\r" in text
    assert "\u202e".encode() not in text
    assert not set(text) & {0x1B, 0x0D, 0xEF}
    if environment["LC_ALL"] != "C":  # what follows takes a process each
        return
    for words in (
        [b"data", b"stats", out],
        [b"data", b"pack", src, out],
        [b"data", b"stats", out + b"/nothing-*.tar"],
        [b"data", b"index", out, b"--out", out],
    ):
        code, text = fastmoco(words, **environment)
        assert code == (0 if words[1:] == [b"stats", out] else 2), text
        assert b"Traceback" not in text
        assert not any(line.startswith(b"all is well") for line in text.splitlines())
        assert not set(text) & {0x1B, 0x0D}


@pytest.mark.parametrize("verb", ["check", "stats"])
def test_the_sets_of_a_folder_come_one_by_one(tmp_path, capsys, verb):
    from fastmoco_pipelines import pack_folder

    for part, count in (("train", 3), ("test", 1)):
        for i in range(count):
            path = tmp_path / part / "cat" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i))
        pack_folder(tmp_path / part, tmp_path / "out", prefix=part)
    words = ["data", verb, str(tmp_path / "out")]
    if verb == "check":
        words += ["--json", str(tmp_path / "report.json"), "--workers", "1"]
    assert main(words) == 0
    text = capsys.readouterr().out
    train, test = (text.index(f"set {part}: {tmp_path}/out/{part}-*") for part in ("train", "test"))
    assert test < train
    if verb == "check":
        assert "1 sample = 1 delivered" in text[test:train]
        assert "3 samples = 3 delivered" in text[train:]
        assert (tmp_path / "report-train.json").exists()
        assert (tmp_path / "report-test.json").exists()
    else:
        assert "1 image in 1 shard" in text[test:train]
        assert "1 class: cat 3" in text[train:]
    assert main(["data", "views", str(tmp_path / "out")]) == 2
    assert f"name one, {tmp_path}/out/test-*.tar or" in capsys.readouterr().err
