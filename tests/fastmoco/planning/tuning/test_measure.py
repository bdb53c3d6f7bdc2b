"""A measurement in a process of its own: its variables, its end, and what is known of a failure."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from fastmoco.config.serial import PATTERNS
from fastmoco.planning.tuning import measure
from fastmoco.planning.tuning.measure import (
    LAUNCH_VARIABLES,
    Failure,
    FreshProcess,
    Measurement,
    environment,
    ignored_variables,
)
from fastmoco.planning.tuning.search import DEFAULTS
from fastmoco.planning.tuning.settings import Settings
from fastmoco.recipes import quickstart_digits
from tests.fault_runs import ROOT

CHILD = """
import json, os, sys
request = json.load(sys.stdin)
{how}
answer = dict(images_per_s=2.0, images_per_cpu_s=1.0, step_s=0.5, peak_bytes=3, others_share=None,
              losses=[1.0], gradient_norms=[2.0], request=request, environment=dict(os.environ))
open(sys.argv[1], "w").write(json.dumps(answer))
"""


def measured(
    how: str, folder: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings = DEFAULTS, limit_s=60.0
) -> Measurement | Failure:  # fmt: skip
    """What becomes of a process that does something before it answers."""
    (folder / "measured_child.py").write_text(CHILD.format(how=how))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    process = FreshProcess(quickstart_digits(), module="measured_child")
    return process(settings, warm_up=1, steps=2, limit_s=limit_s)


def test_a_process_gets_options_and_variables_and_not_those_of_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # what fastmoco sets by itself
    assert {"MALLOC_TOP_PAD_", "OMP_NUM_THREADS"} <= set(ignored_variables())
    assert "GOMP_SPINCOUNT" not in ignored_variables()
    settings = Settings((("batch.chunk", 8),), (("MALLOC_ARENA_MAX", "2"),), ("env", "BEFORE=1"))
    found = measured("", tmp_path, monkeypatch, settings)
    assert isinstance(found, Measurement)
    assert (found.images_per_s, found.losses, found.peak_bytes) == (2.0, (1.0,), 3)
    assert found.seconds > 0
    request, variables = found.details["request"], found.details["environment"]
    assert request["config"]["batch"]["chunk"] == 8
    assert set(request["patterns"]) == {".".join(pair) for pair in PATTERNS}
    assert (request["warm_up"], request["steps"]) == (1, 2)
    assert variables["MALLOC_ARENA_MAX"] == "2"
    assert variables["BEFORE"] == "1"
    assert variables["OMP_NUM_THREADS"] == "1"
    assert not {"MALLOC_TOP_PAD_", "GOMP_SPINCOUNT"} & variables.keys()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL, as the system does when memory runs out"),
        ("sys.exit('the reason\\n')", "ended with 1: the reason"),
        ("sys.exit(0)", "ended with 0: no output"),
        ("import time; time.sleep(60)", "not ended after 1 s"),
        (
            "open(sys.argv[1], 'w').write('{\"failed\": \"out of memory: 1 GiB\"}'); sys.exit(0)",
            "out of memory: 1 GiB",
        ),
    ],
)
def test_a_process_that_fails_is_a_result_with_its_reason(
    how: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    limit_s = 1.0 if "sleep" in how else 60.0
    assert measured(how, tmp_path, monkeypatch, limit_s=limit_s) == Failure(reason)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (b"[1]", "AttributeError|TypeError|KeyError"),
        (b"{}", "KeyError: 'images_per_s'"),
        (b"null", "TypeError"),
        (b"\xff", "line 1, byte 0: 0xff is not UTF-8"),
        (b"[" * 200_000, "not JSON|nested deeper"),
        (None, "is a named pipe where a file is due"),
    ],
)
def test_an_answer_that_is_none_is_a_failure_with_its_reason(
    made: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], *others: object) -> int:
        if made is None:
            os.mkfifo(command[-1])
        else:
            Path(command[-1]).write_bytes(made)
        return 0

    monkeypatch.setattr(measure, "_run", run)
    found = FreshProcess(quickstart_digits())(DEFAULTS, warm_up=1, steps=2, limit_s=60)
    assert isinstance(found, Failure)
    assert re.search(f"its answer cannot be used: .*({reason})", found.reason)


def test_settings_that_the_config_refuses_start_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured("", tmp_path, monkeypatch, Settings((("model.checkpointing", "half"),)))
    assert isinstance(found, Failure)
    assert "must be one of" in found.reason
    found = measured("", tmp_path, monkeypatch, Settings(prefix=("no-such-program",)))
    assert found == Failure("ended with 127: no-such-program: No such file or directory")


def test_the_variables_are_those_of_the_launch_scripts() -> None:
    lines = (ROOT / "launch" / "settings.sh").read_text().splitlines()
    exports = dict(line.removeprefix("export ").split("=", 1) for line in lines if "export" in line)
    assert exports == {name: f'"${{{name}:-{value}}}"' for name, value in LAUNCH_VARIABLES.items()}
    assert json.dumps(environment(Settings()))  # all of them texts
