"""`fastmoco data check`, `data stats` and `data index`: what they print, write and return."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.formats.index import index_path, read_index
from fastmoco_pipelines.formats.paths import MEMBER, to_list
from fastmoco_pipelines.inspecting.tar_check import TarCheck
from tests.command_line import main


def image(i: int, size: tuple[int, int] = (48, 40)) -> bytes:
    coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(out, "JPEG")
    return out.getvalue()


def put(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path):
    """Six labelled images, class names in .txt."""
    texts = [b"cat", b"[red]owl"]
    pairs = [((f"{i}.jpg", image(i)), (f"{i}.txt", texts[i % 2])) for i in range(6)]
    return put(tmp_path / "set-00.tar", [member for pair in pairs for member in pair])


def test_index_check_and_stats_of_a_foreign_set(shards, capsys):
    assert main(["data", "check", str(shards), "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "6 samples = 6 delivered + 0 quarantined" in text
    assert "note: set-00.tar: has no index beside it" in text
    assert "1 shard that a loader refuses: no index yet" in text
    last = text.splitlines()[-1]
    assert last == f"no fault; not indexed yet: run `fastmoco data index {shards}` before training"
    assert main(["data", "index", str(shards)]) == 0
    text = capsys.readouterr().out
    assert "6 images in 1 shard indexed, 0 members skipped" in text
    assert "labels of 6 from .txt, 2 class names" in text
    assert main(["data", "check", str(shards), "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "clean"
    assert main(["data", "stats", str(shards)]) == 0
    text = capsys.readouterr().out
    for words in (
        "6 images in 1 shard",
        "width (pixels)",
        "bits per pixel",
        "formats: JPEG 6",
        "2 classes: [red]owl 3, cat 3",
    ):
        assert words in text


def test_faults_are_printed_escaped_and_written(shards, tmp_path, capsys):
    with tarfile.open(shards, "a") as tar:
        for name, data in (
            ("x\x1b]0;evil\x07.jpg", image(1)),
            ("[bold]y.jpg", b"<html>"),
            ("z.jpg", image(9)[:-200]),
            (MEMBER, to_list([("z", "odd/\x1b[2Jz\udce9.jpg")])),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = tmp_path / "reports" / "report.json"
    assert main(["data", "check", str(shards), "--json", str(report), "--workers", "1"]) == 1
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "set-00.tar: [bold]y.jpg: its content is no JPEG, PNG or WebP [left out]" in text
    file = r"odd/\x1b[2Jz\udce9.jpg"  # where there is no index yet, from the tar itself
    assert f"set-00.tar: z.jpg ({file}): it cannot be decoded" in text
    assert "7 samples = 6 delivered + 1 quarantined" in text
    assert "2 further samples omitted" in text
    content = json.loads(report.read_text())
    assert content["counts"] == {"no image": 1, "damaged image": 1, "unsafe name": 1}
    assert {fault["file"] for fault in content["faults"]} == {"", file}
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["file"] == file
    assert (
        main(["data", "check", str(shards), "--show", "1", "--workers", "1", "--no-quarantine"])
        == 1
    )
    assert "... and 2 more (--show N prints more" in capsys.readouterr().out


def test_a_sample_is_called_one(shards, tmp_path, capsys):
    check = ["data", "check", str(shards), "--workers", "1"]
    assert main([*check, "--sample", "3"]) == 2
    assert "no tar has an index that fits it" in capsys.readouterr().err
    assert main(["data", "index", str(shards)]) == 0
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert main([*check, "--sample", "3", "--seed", "5", "--json", str(report)]) == 0
    text = capsys.readouterr().out
    assert (
        "a sample: 3 of 6 indexed images were checked, from 1 of 1 shard (seed 5); 0 are bad"
        in text
    )
    assert "at most 63.2 % of all indexed images are bad (rule of three: 3 / 3)" in text
    assert "3 drawn samples = 3 delivered + 0 quarantined" in text
    assert text.splitlines()[-1] == "no fault in the sample"
    assert json.loads(report.read_text())["sample"] == 3
    assert main([*check, "--sample", "7"]) == 0
    text = capsys.readouterr().out
    assert "a sample: 6 of 6 indexed images" in text
    assert "every image that an index lists" in text
    assert "confidence" not in text
    raw = bytearray(shards.read_bytes())
    raw[read_index(shards).columns["offset"][2] + 400] ^= 1
    shards.write_bytes(raw)
    assert main(["data", "index", str(shards)]) == 0
    raw[read_index(shards).columns["offset"][2] + 400] ^= 1
    shards.write_bytes(raw)  # not at its ends, so that the index still is of this tar
    capsys.readouterr()
    assert main([*check, "--sample", "6"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 fault in the sample"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--sample", "3", "--continue"], "give --sample or --continue, not both"),
        (["--sample", "0"], "--sample 0: must be at least 1"),
        (["--sample", "3", "--seed", "-1"], "--seed -1: must be from 0"),
    ],
)
def test_samples_that_make_no_sense_are_refused(shards, words, error, capsys):
    assert main(["data", "index", str(shards)]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(shards), "--workers", "1", *words]) == 2
    assert error in capsys.readouterr().err


def test_ctrl_c_gives_the_command_that_goes_on(shards, monkeypatch, capsys):
    put(shards.with_name("set-01.tar"), [("a.jpg", image(31))])
    run = TarCheck.run

    def broken(check, pool, advance):
        if check.path.name == "set-01.tar":
            raise KeyboardInterrupt
        return run(check, pool, advance)

    monkeypatch.setattr(TarCheck, "run", broken)
    pattern = f"{shards.parent}/set-*.tar"
    check = ["data", "check", pattern, "--workers", "1", "--seconds-per-image", "20.0"]
    assert main(check) == 130
    command = f"fastmoco data check '{pattern}' --workers 1 --seconds-per-image 20.0 --continue"
    error = capsys.readouterr().err
    assert error == f"fastmoco: interrupted, 1 of 2 tars are checked; to go on: {command}\n"
    monkeypatch.undo()
    assert main(shlex.split(command)[1:]) == 0
    captured = capsys.readouterr()
    assert captured.err == "fastmoco: 1 of 2 tars are checked already\n"
    assert "7 samples = 7 delivered + 0 quarantined" in captured.out
    monkeypatch.setattr(TarCheck, "run", broken)
    (shards.parent / "b").mkdir()
    assert (
        main(["data", "check", str(put(shards.parent / "b" / "set-01.tar", [])), "--workers", "1"])
        == 130
    )
    assert capsys.readouterr().err == "fastmoco: interrupted, 0 of 1 tars are checked\n"


def test_a_log_gets_a_line_a_minute_with_the_time_that_is_left(monkeypatch, capsys):
    pytest.importorskip("tyro")
    from fastmoco.cli import data

    now = [100.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    with data.progress_bar("checking", unit="bytes") as advance:
        for seconds, done in ((0, 400), (30, 450), (60, 500), (61, 510), (130, 600), (200, 1000)):
            now[0] = 100.0 + seconds
            advance(done, 1000)
    # The 400 at the start were done before: 100 in the first minute, 200 in 130 s.
    assert capsys.readouterr().err.splitlines() == [
        "fastmoco: checking: 50.0 % done, 0:05:00 left",
        "fastmoco: checking: 60.0 % done, 0:04:20 left",
    ]


def test_lines_at_growing_intervals(monkeypatch, capsys):
    from fastmoco.cli import data

    now = [0.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    with data.progress_bar("embedding", growing=True) as advance:
        for second in range(301):
            now[0] = float(second)
            advance(second, 400)
    # After 20 s, and 40, 80 and 160 s later.
    shown = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["5.0", "15.0", "35.0", "75.0"]


@pytest.mark.parametrize(("calls", "stays"), [([], False), ([(2, 2)], True)])
def test_only_the_bar_of_work_that_was_done_stays(calls, stays, monkeypatch, capsys):
    pytest.importorskip("tyro")
    from fastmoco.cli.data import progress_bar

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)
    with progress_bar("packing x-[/a].tar") as advance:
        for done, total in calls:
            advance(done, total)
    shown = capsys.readouterr().err
    erased = shown.rpartition("\x1b[2K")[2].strip() == ""
    assert "packing x-[/a].tar" in shown
    assert erased is not stays


@pytest.mark.parametrize("verb", ["check", "stats", "index"])
def test_a_pattern_without_files_is_refused_in_one_line(verb, tmp_path, capsys):
    assert main(["data", verb, str(tmp_path / "none-*.tar")]) == 2
    error = capsys.readouterr().err
    assert "none-" in error
    assert len(error.strip().splitlines()) == 1


def test_a_label_field_chooses_json(shards, capsys):
    assert main(["data", "index", str(shards), "--labels", "txt", "--label-field", "x"]) == 2
    assert "--label-field x" in capsys.readouterr().err
    assert main(["data", "index", str(shards), "--label-field", "x"]) == 2
    assert (
        "none of the 6 images has a .json beside it with the field 'x'" in capsys.readouterr().err
    )
    assert not index_path(shards).exists()


def test_a_source_that_tells_no_label_leaves_the_earlier_index_alone(shards, capsys):
    assert main(["data", "index", str(shards)]) == 0
    before = {path.name: path.read_bytes() for path in shards.parent.iterdir()}
    assert main(["data", "index", str(shards), "--labels", "cls"]) == 2
    error = capsys.readouterr().err
    assert "--labels cls: none of the 6 images has a .cls beside it" in error
    assert "--labels none" in error
    assert {path.name: path.read_bytes() for path in shards.parent.iterdir()} == before
    # One tar without labels among others that have them is none of this.
    put(shards.with_name("set-.tar"), [("a.jpg", image(30))])
    assert main(["data", "index", str(shards.parent), "--labels", "txt"]) == 0
    assert "labels of 6 of 7 from .txt" in capsys.readouterr().out
    assert read_index(shards.with_name("set-.tar")).columns["label"] == [-1]


def test_an_unindexed_tar_among_others_is_told_and_notes_are_cut_by_show(shards, capsys):
    assert main(["data", "index", str(shards)]) == 0
    for number in (1, 2):
        put(shards.with_name(f"set-0{number}.tar"), [("a.jpg", image(30 + number))])
    capsys.readouterr()
    report = shards.with_name("report.json")
    options = ["--show", "1", "--workers", "1", "--json", str(report)]
    assert main(["data", "check", f"{shards.parent}/*.tar", *options]) == 0
    text = capsys.readouterr().out
    assert text.count("note: ") == 1
    assert "... and 1 more note" in text
    words = f"no fault; 2 of 3 shards not indexed yet: run `fastmoco data index '{shards.parent}/*.tar'` before training"
    assert text.splitlines()[-1] == words
    content = json.loads(report.read_text())
    assert (content["clean"], content["unindexed"], content["refused_shards"]) == (False, 2, 2)


def test_tars_of_one_name_are_told_apart(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        put(tmp_path / folder / "x.tar", [("1.jpg", image(1)), ("2.jpg", b"<html>")])
    put(tmp_path / "b" / "y.tar", [("1.jpg", b"<html>"), ("2.jpg", image(2))])
    pattern, report = f"{tmp_path}/*/*.tar", tmp_path / "report.json"
    assert main(["data", "check", pattern, "--workers", "1", "--json", str(report)]) == 1
    text = capsys.readouterr().out
    for words in (
        f"{tmp_path}/b/x.tar: 2.jpg: its",
        "\ny.tar: 1.jpg: its",
        f"note: {tmp_path}/a/x.tar: has no index",
    ):
        assert words in text
    faults = json.loads(report.read_text())["faults"]
    expected = [("x.tar", f"{tmp_path}/a/x.tar"), ("x.tar", f"{tmp_path}/b/x.tar"), ("y.tar", "")]
    assert [(fault["shard"], fault["path"]) for fault in faults] == expected
    (tmp_path / "b" / "x.tar").write_bytes(b"x" * 2000)
    assert main(["data", "index", pattern]) == 2
    assert f"{tmp_path}/b/x.tar: " in capsys.readouterr().err
    assert main(["data", "stats", pattern]) == 2
    assert f"{tmp_path}/b/x.tar: has no index" in capsys.readouterr().err


def test_skipped_members_beyond_the_first_twenty_are_counted(shards, capsys):
    put(shards, [("a.jpg", image(1)), *((f"{i:02d}.gif", b"GIF89a") for i in range(23))])
    assert main(["data", "index", str(shards)]) == 0
    text = capsys.readouterr().out
    assert text.count("\nskipped ") == 20
    assert "... and 3 more skipped members, listed in the indexes" in text


def test_stats_draw_a_picture(shards, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["data", "index", str(shards)]) == 0
    assert main(["data", "stats", str(shards), "--out", str(tmp_path / "stats.png")]) == 0
    assert (tmp_path / "stats.png").read_bytes()[:4] == b"\x89PNG"


def test_the_index_is_written_as_json_too(shards, capsys):
    assert main(["data", "index", str(shards), "--json"]) == 0
    assert "images in 1 shard indexed" in capsys.readouterr().out
    assert json.loads(shards.with_name(f"{shards.name}.index.json").read_text())["version"] == 1
