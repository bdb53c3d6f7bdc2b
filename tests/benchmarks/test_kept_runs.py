"""Programs that run once: what is kept of them, and whose CPU-seconds are counted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.kept_runs import once, run_program

BUSY = "import pathlib, time\nwhile time.process_time() < .5: pass\npathlib.Path({0!r}).touch()"
WAITING = "import pathlib, time\nwhile not pathlib.Path({0!r}).exists(): time.sleep(.05)"


def test_a_program_runs_once_and_its_last_line_of_json_is_kept(tmp_path: Path) -> None:
    code = "print('text'); print('{\"a\": 1}'); print('{\"a\": 2}'); print('more')"
    first = once(tmp_path, "name", "-c", code)
    assert first["result"] == {"a": 2}
    assert first["cpu_s"] > 0
    assert once(tmp_path, "name", "-c", "raise SystemExit(1)") == first


def test_a_program_that_fails_names_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "name.log"
    with pytest.raises(SystemExit, match=rf"ended with 3; see {log}"):
        once(tmp_path, "name", "-c", "import sys; sys.stderr.write('why'); sys.exit(3)")
    assert log.read_text() == "why"


def test_cpu_seconds_are_those_of_a_program_alone(tmp_path: Path) -> None:
    done = str(tmp_path / "done")
    programs = {"busy": BUSY.format(done), "waiting": WAITING.format(done)}
    with ThreadPoolExecutor(2) as pool:
        ran = pool.map(
            lambda item: run_program(tmp_path / item[0], "-c", item[1]), programs.items()
        )
        busy, waiting = (seconds for _, seconds in ran)
    assert busy >= 0.5 > waiting
