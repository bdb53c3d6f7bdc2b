"""`--log json`: standard output has lines of JSON alone, whatever the command prints elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="tyro is not installed")

from fastmoco.cli.output import json_log, print_result, run_logged
from fastmoco.errors import EXIT_REFUSED
from fastmoco.errors.log import STYLE
from tests.command_line import main


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_and_its_repetition(digits, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["train", "quickstart_digits", "--out", str(tmp_path / "run"), "--log", "json"]
    words += ["--data.shards", digits[1], "--global-batch-size", "64", "--epochs", "2"]
    words += ["--optim.warmup-epochs", "1", "--log-every-steps", "2", "--knn.test-shards"]
    words += [digits[1], "--threads", "1"]
    assert main(words) == 0
    out, errors = capsys.readouterr()
    found = rows(out)
    assert found[0]["kind"] == "start"
    assert (found[0]["total_steps"], found[0]["run"]) == (10, str(tmp_path / "run"))
    steps = [row for row in found if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 4, 6, 8, 10]
    assert {"epoch", "loss", "lr", "images_per_s", "wait_share", "eta_s", "knn"} <= set(steps[-1])
    assert [row["step"] for row in found if row["kind"] == "measured"] == [0, 10]
    assert (found[-1]["kind"], found[-1]["code"], found[-1]["state"]) == ("end", 0, "finished")
    assert "next" in errors
    assert STYLE.get() == "auto"

    # Finished already: an event and the end.
    assert main(words) == 0
    found = rows(capsys.readouterr().out)
    assert {row["kind"] for row in found} == {"event", "end"}


def test_a_refusal_is_an_end_too(tmp_path: Path, capsys) -> None:
    words = ["--out", str(tmp_path / "run"), "--log=json"]
    assert main(["train", "quickstart_digits", *words]) == EXIT_REFUSED
    out, errors = capsys.readouterr()
    [end] = rows(out)
    assert (end["kind"], end["code"], end["state"]) == ("end", 2, "refused")
    assert "--data.shards" in errors


def test_what_libraries_print_goes_to_standard_error() -> None:
    """Also what is written to the descriptor, as by a library of C or a child."""
    code = (
        "import os, sys\n"
        "from fastmoco.cli import main, output\n"
        "def call():\n"
        "    print('one'); os.write(1, b'two\\n'); os.system('echo three')\n"
        "    return 75\n"
        "main._main = lambda args, process_ends: output.run_logged('json', call)\n"
        "sys.exit(main.main())\n"
    )
    left = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=left
    )
    assert done.returncode == 75
    [end] = rows(done.stdout)
    assert (end["kind"], end["code"], end["state"]) == ("end", 75, "stopped")
    assert sorted(done.stderr.split()) == ["one", "three", "two"]


def test_a_result_is_a_line_of_the_log_or_alone(capsys) -> None:
    def call() -> int:
        print("for people")
        print_result('{"top1": 0.5}')
        return 0

    assert run_logged("json", call) == 0
    out, errors = capsys.readouterr()
    result, end = rows(out)
    assert (result["kind"], result["top1"], end["kind"]) == ("result", 0.5, "end")
    assert errors == "for people\n"
    assert run_logged("lines", call) == 0
    assert json_log() is None
    assert capsys.readouterr().out == 'for people\n{"top1": 0.5}\n'


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError(), "failed")]
)
def test_an_end_is_written_however_the_command_ends(error, state, capsys) -> None:
    def call() -> int:
        raise error

    with pytest.raises(type(error)):
        run_logged("json", call)
    [end] = rows(capsys.readouterr().out)
    assert end["state"] == state


def test_only_the_first_process_writes(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert run_logged("json", lambda: 0) == 0
    assert capsys.readouterr().out == ""
