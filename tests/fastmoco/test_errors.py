"""What is said on standard error."""

from __future__ import annotations

import errno

import pytest

from fastmoco.errors import RunError, one_line, say


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a\x1b[2J\nfastmoco: b"),
            "a\\x1b[2J\\nfastmoco: b: No space left on device; free some space, or choose a folder"
            " on another disk",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", b"n\xef"),
            "n\\udcef: Permission denied",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"),
            "a part of this path is a file",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "$X/a"), "$X in single quotes"),
        (OSError("only text"), "only text"),
        (ValueError("line\nfastmoco: forged"), "line\\nfastmoco: forged"),
    ],
)
def test_errors_name_the_file_and_the_cure_on_one_line(capsys, error, text):
    with pytest.raises(SystemExit), one_line(2, ValueError, OSError):
        raise error
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.count("\n") == 1


def test_a_hostile_name_cannot_steer_the_terminal(capsys):
    say("a\x1b[2Jb.tar: is not there\n  d\udcffe \u202e\u9f8d")
    assert (
        capsys.readouterr().err
        == "fastmoco: a\\x1b[2Jb.tar: is not there\n  d\\udcffe \\u202e\u9f8d\n"
    )
    with pytest.raises(SystemExit, match="2"), one_line(2):
        raise RunError("\x07")
    assert capsys.readouterr().err == "fastmoco: \\x07\n"
