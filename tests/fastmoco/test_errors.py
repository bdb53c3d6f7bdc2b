"""What is said on standard error."""

from __future__ import annotations

import pytest

from fastmoco.errors import RunError, one_line, say


def test_a_hostile_name_cannot_steer_the_terminal(capsys):
    say("a\x1b[2Jb.tar: is not there\n  d\udcffe \u202e\u9f8d")
    assert (
        capsys.readouterr().err
        == "fastmoco: a\\x1b[2Jb.tar: is not there\n  d\\udcffe \\u202e\u9f8d\n"
    )
    with pytest.raises(SystemExit, match="2"), one_line(2):
        raise RunError("\x07")
    assert capsys.readouterr().err == "fastmoco: \\x07\n"
