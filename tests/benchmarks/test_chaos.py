"""The chaos run: a short one ends in the same bits, plans repeat with their seed, and its table in
the docs is the one that it writes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice

import pytest
import torch

from benchmarks.chaos import report
from benchmarks.chaos.cures import cure
from benchmarks.chaos.damage import PRECIOUS, Folder
from benchmarks.chaos.ends import End, differences, row_differences
from benchmarks.chaos.plan import BEFORE, LIMITS, LIVE, MODES, Event, Story, stories
from benchmarks.chaos.processes import ROOT, Command, environment
from benchmarks.chaos.story import Happened, Told, words_of

PAGE = ROOT / "docs" / "faults.md"


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.slow
def test_a_disturbed_run_ends_in_the_bits_of_an_undisturbed_one(tmp_path):
    """Another seed than that of the table."""
    words = ["--seed", "3", "--modes", "one", "--events", "5", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks.chaos", *words],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"^\| all \| (\d+) \| (\d+) \| (\d+) \| 0 \|", done.stdout, re.MULTILINE)
    assert counts is not None, done.stdout
    assert int(counts[1]) >= 5
    assert counts[2] == counts[3]
    assert (tmp_path / "out" / "events.jsonl").read_text().count('"event"') == int(counts[1])


def test_a_plan_repeats_with_its_seed_and_holds_everything():
    first, again = (list(islice(stories(5), 200)) for _ in range(2))
    assert first == again
    assert first[:20] != list(islice(stories(6), 20))
    events = [event for story in first for event in story.events]
    assert [event.number for event in events] == list(range(len(events)))
    kinds = Counter(event.what for event in events)
    assert set(kinds) == {*BEFORE, *LIMITS, *LIVE}
    assert {story.mode for story in first} == set(MODES)


def test_only_the_story_of_an_event_is_played_again():
    from benchmarks.chaos.__main__ import _chosen

    for number in (0, 7, 23):
        (story,) = _chosen(0, number)
        assert number in [event.number for event in story.events]


def test_a_damage_stays_inside_the_folder(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "manifest.json").write_text('{"format": "x"}')
    for number, what in enumerate(BEFORE[:11]):
        folder = Folder(tmp_path / str(number), shards)
        event = Event(number=0, what=what, whom="manifest", seed=number)
        assert folder.damage(event) == "data/manifest.json"
        path = folder.path / "data" / "manifest.json"
        assert (
            path.is_symlink()
            or not path.is_file()
            or not os.access(path, os.R_OK)
            or (
                path.stat().st_mode & 0o777 == 0
                or path.read_text(errors="replace") != '{"format": "x"}'
                or what == "cut"
            )
        )
        assert (folder.path / "precious").read_bytes() == PRECIOUS
    assert (shards / "manifest.json").read_text() == '{"format": "x"}'


def test_cures_are_those_of_the_message(tmp_path):
    (tmp_path / "shards").mkdir()
    folder = Folder(tmp_path / "story", tmp_path / "shards")
    (folder.run / "checkpoints").mkdir(parents=True)
    (folder.run / "config.json").write_text("{}")
    words = words_of("one")
    assert cure("fastmoco: nothing that a person could do", folder, words) == ""
    text = "fastmoco: run/config.json: is a folder where a file is due; move it away"
    assert cure(text, folder, words) == "moved run/config.json away"
    assert not (folder.run / "config.json").exists()
    outside = f"fastmoco: {tmp_path}/shards/x: move it away"
    (tmp_path / "shards" / "x").touch()
    assert cure(outside, folder, words) == ""
    assert (tmp_path / "shards" / "x").exists()
    assert cure("fastmoco: ... add --trust to continue from it", folder, words) == "--trust"
    assert words[-1] == "--trust"
    (folder.run / "config.json").write_text("{}")
    (folder.run / "config.json").chmod(0)
    assert cure("fastmoco: cannot write: Permission denied", folder, words) == "given rights"


def test_one_bit_is_a_difference():
    rows = {1: {"step": 1, "loss": 1.0}}
    end = End(step=1, tensors={"a": torch.ones(3)}, state={"x": 1}, rows=rows, repeated=0)
    same = End(step=1, tensors={"a": torch.ones(3)}, state={"x": 1}, rows=rows, repeated=0)
    assert differences(end, same) == row_differences(end, same) == []
    same.tensors["a"].view(torch.int32)[1] ^= 1
    assert differences(end, same) == ["a has other bits"]
    other = End(step=1, tensors=end.tensors, state={"x": 2}, rows={}, repeated=1)
    assert differences(other, end) == ["state: x"]
    assert row_differences(other, end) == ["step 1", "1 rows repeated"]


def test_what_outlives_its_command_is_found_and_ended(tmp_path, monkeypatch):
    from benchmarks.chaos import processes

    monkeypatch.setattr(processes, "LEFT_SECONDS", 0.2)
    command = Command(["--version"], tmp_path, tmp_path / "log", limits={}, forked=False)
    variables = environment() | {processes.TOKEN: command._token}
    left = subprocess.Popen(["sleep", "100"], env=variables, start_new_session=True)
    while command.poll() is None:
        time.sleep(0.01)
    assert command.end_left() == 1
    assert left.wait() == -signal.SIGKILL
    assert command.living() == []


def told(mode: str) -> Told:
    event = Event(number=0, what="kill", whom="run", moment="step", at=3.0)
    happened = [Happened(event=event, to="process 1", outcome="code -9", seconds=1.0)]
    story = Story(number=0, mode=mode, rounds=())
    return Told(story=story, happened=happened, runs=1)


def test_the_table_in_the_docs_is_the_one_that_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    written = report.table_of([told("one"), told("ddp")], 0, seconds=60.0)
    report.write_table(page, written)
    assert report.read_table(page) == written
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")

    # Of the same form: heads, numbers, commit and date; and nothing went wrong.
    def form(text: str) -> list[str]:
        lines = [re.sub(r"\b[0-9a-f]{7,40}\b|\d+", "N", line) for line in text.splitlines()]
        return [line for line in lines if not re.match(r"\| (before|during|limit)", line)]

    shown = report.read_table(PAGE)
    ours = [line for line in form(shown) if not re.match(r"\| (one|ddp|fsdp) ", line)]
    assert ours == [line for line in form(written) if not re.match(r"\| (one|ddp|fsdp) ", line)]
    counts = re.search(r"^\| all \| (.*) \|$", shown, re.MULTILINE)
    assert counts is not None
    events, runs, same, silent, _, left, hangs = map(int, counts[1].split(" | "))
    assert events >= 150
    assert runs == same
    assert silent == left == hangs == 0
    kinds = re.findall(r"^\| (?:before a start|during a start|limit): .*", shown, re.MULTILINE)
    assert sum(int(line.split(" | ")[1]) for line in kinds) == events


def test_a_page_without_a_place_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        report.write_table(tmp_path / "page.md", "x")
