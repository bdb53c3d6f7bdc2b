"""The instrument for a GPU: its stages and goals as data, its lines and gates, and a dry run of
every stage."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import end_to_end, environment, goals, kernel_tests, rows, runner, tree
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.caches import keep_caches, take_caches
from benchmarks.gpu.carried import unpack
from benchmarks.gpu.lines import run_lines
from benchmarks.gpu.runner import Run
from benchmarks.gpu.stages import STAGES, Row, Stage, checked, chosen, within
from benchmarks.gpu.summary import LINES, shown, summary
from benchmarks.gpu.tests_of import TESTS_OF
from benchmarks.measure import commit, machine
from benchmarks.registry import CASES

ROWS = [row for stage in STAGES for row in stage.rows]
CEILINGS = {"matmul_tflops": 395.0, "copy_gb_per_s": 2150.0}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_a_case_with_its_options(row):
    CASES[row.case].options((*row.options, *row.dry, "device=cpu"))


def test_stages_are_chosen_by_name_or_run_and_keep_their_order():
    assert [stage.name for stage in chosen("")] == [stage.name for stage in STAGES]
    assert [stage.name for stage in chosen("ceilings, smoke")] == ["smoke", "ceilings"]
    assert {stage.run for stage in chosen("b")} == {"b"}
    with pytest.raises(ValueError, match="'speed' is none of a, b, env"):
        chosen("speed")
    left = {stage.name for stage in STAGES if within(stage, "info_nce")}
    assert left == {"env", "smoke", "ceilings", "tests", "compile", "loss"}
    assert {
        stage.name for stage in STAGES if within(stage, "loss 16384")
    } == left  # tests and checks of a row's op
    assert [op for op in TESTS_OF if checked("loss 16384", op)] == ["info_nce"]


def test_every_gate_has_tests_and_every_goal_a_row():
    for op, patterns in TESTS_OF.items():
        assert kernel_tests.test_files(patterns) or op == "step", op
    assert {row.op for row in ROWS} <= {*TESTS_OF, "loader"}
    stages = {
        end_to_end.NAME,
        *(end_to_end.RATIO.format(model) for model in end_to_end.GOALS),
    }
    named = {row.name for row in ROWS} | stages
    for goal in goals.GOALS:
        assert {goal.row, goal.over_row or goal.row} <= named


def test_every_test_that_needs_a_gpu_gates_an_op():
    """Or it never runs on one. Those of pipelines need DALI's GPU part and take minutes; those of
    benchmarks are of the instrument."""
    gating = {file for patterns in TESTS_OF.values() for file in kernel_tests.test_files(patterns)}
    needing = {
        str(path.relative_to(kernel_tests.ROOT))
        for folder, sign in (("fastmoco", "mark.gpu"), ("kernels", '"cuda" if torch.cuda.is_ava'))
        for path in (kernel_tests.ROOT / "tests" / folder).rglob("test_*.py")
        if sign in path.read_text() or "mark.gpu" in path.read_text()
    }
    assert len(needing) > 20
    assert needing <= gating


def test_files_with_tests_for_each_device_run_those_of_the_gpu(tmp_path, monkeypatch):
    """A file of `tests/fastmoco` runs its marked tests alone, one of the kernels all."""
    text = "import pytest\n\n@pytest.mark.gpu\ndef test_a(): ...\n\ndef test_b(): ...\n"
    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    for folder, passed in (("fastmoco", 1), ("kernels", 2)):
        file = tmp_path / "tests" / folder / "test_it.py"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        code, last = kernel_tests.run_file(str(file.relative_to(tmp_path)), time.monotonic() + 60)
        assert code == 0
        assert f"{passed} passed" in last


def test_goals_follow_the_card():
    times = {"milliseconds": {"triton": 1.5}, "speedup": {"naive": {"median": 8.0}}}
    on_h200, naive = goals.outcomes("loss 16384", times, "NVIDIA H200", CEILINGS)
    assert (on_h200.wanted, on_h200.met, naive.met) == (1.0, False, True)
    elsewhere = goals.outcomes("loss 16384", times, "NVIDIA H100 80GB HBM3", CEILINGS)[0]
    assert (elsewhere.wanted, elsewhere.met) == (
        2.0,
        True,
    )  # half the rate of products, twice the time
    step = goals.outcomes(
        "ViT-S 4096", {"images_per_s": {"fastmoco": [3000.0, 2000.0, 2600.0]}}, "H100", CEILINGS
    )[0]
    assert (step.wanted, step.measured) == (2500.0, 2600.0)
    assert "G7 met" in str(step)
    unscaled, naive = goals.outcomes("loss 16384", times, "NVIDIA H100 80GB HBM3", {})
    assert (unscaled.wanted, unscaled.met, naive.met) == (None, None, True)
    assert "G1 unscaled: milliseconds.triton 1.5" in str(unscaled)


def test_shares_are_of_the_measured_ceilings():
    assert goals.shares({"work": {"flops": 395e9, "bytes": 215e7, "ms": 2.0}}, CEILINGS) == {
        "matmul": 0.5,
        "copy": 0.5,
    }
    assert goals.shares({"work": {"flops": 1, "ms": None}}, CEILINGS) == {}


def test_the_summary_is_short_and_begins_with_the_faults():
    result = {
        "milliseconds": {"ours": 0.5},
        "speedup": {"naive": {"median": 8.0}},
        "failed": {"wrong": "gradient"},
    }
    line = {"name": "loss 16384", "status": "ok", "result": result, "share": {"matmul": 0.5}}
    text = "\n".join(shown(line, CEILINGS, "H100"))
    for part in (
        "ours 0.500",
        "naive 8.00x",
        "failed wrong: gradient",
        "matmul 50%",
        "G1 met: speedup.naive.median",
    ):
        assert part in text
    failed = {"name": "ema", "status": "failed", "reason": "too far"}
    found = summary([line] * 60 + [failed], [("loss", "ok", 3.0)], CEILINGS, "H100")
    assert len(found) <= LINES
    assert "failed: ema: too far" in found[3]


def test_without_git_or_a_driver_nothing_is_lost(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"
    assert {"torch", "triton", "numpy", "commit"} <= machine().keys()
    monkeypatch.setenv("FASTMOCO_COMMIT", "abc123")
    assert machine()["commit"] == "abc123"


@pytest.mark.skipif(not environment.compiler(), reason="needs a C compiler")
def test_the_c_part_is_built_with_the_flags_of_setup_py(tmp_path):
    assert "-ffp-contract=off" in environment.build_flags()
    said, failed = environment.build_native(environment.NATIVE, out=tmp_path / "native.so")
    assert (said.split()[0], failed) == ("built", False)
    assert ctypes.CDLL(str(tmp_path / "native.so")).fastmoco_cut_views
    assert environment.build_native(environment.NATIVE, out=tmp_path / "native.so") == (
        "was there",
        False,
    )


def test_wheels_are_unpacked_and_a_broken_one_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    carried = tmp_path / ".gpu"
    carried.mkdir()
    assert unpack(carried) == (None, [])
    with zipfile.ZipFile(carried / "one-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one/__init__.py", "")
        wheel.writestr("one-1.0.data/purelib/two.py", "")
    (carried / "broken.whl").write_bytes(b"no zip")
    for _ in range(2):
        site, names = unpack(carried)
        assert (site / "one" / "__init__.py").exists()
        assert (site / "two.py").exists()
        assert names[0] == "one-1.0-py3-none-any.whl"
        assert names[1].startswith("broken.whl FAILED")
    (site / "two.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    said = "not used: two.cpython-39-x86_64-linux-gnu.so is of another Python"
    assert unpack(carried) == (None, [said])


def test_caches_travel_to_a_machine_that_has_none(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "one"))
    named = take_caches(out)
    Path(named["TRITON_CACHE_DIR"], "kernel.cubin").write_bytes(b"code")
    assert "MiB in caches.tar.xz" in keep_caches(out)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "two"))
    other = take_caches(out)
    assert other.keys() == named.keys()
    assert Path(other["TRITON_CACHE_DIR"], "kernel.cubin").read_bytes() == b"code"
    assert unpack(out) == (None, [])
    (out / "caches.tar.xz").write_bytes(b"damaged")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "three"))
    assert Path(take_caches(out)["TRITON_CACHE_DIR"]).is_dir()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_tree_travels_without_what_its_code_does_not_need_there(tmp_path, monkeypatch):
    root, out = tmp_path / "tree", tmp_path / "out"
    for name in ("a.py", "docs/images/a.svg", "tests/golden/siblings/dino.npz", *tree.KEPT):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("one")
    (root / "new.py").write_text("not tracked")
    out.mkdir()
    git = ("git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "a.py", "docs", "tests"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    monkeypatch.setattr(tree, "ROOT", root)
    commit = tree.make(out)
    with tarfile.open(out / tree.NAME) as packed:
        assert sorted(packed.getnames()) == ["a.py", *tree.KEPT]
    script = (out / tree.SCRIPT).read_text()
    assert f"FASTMOCO_COMMIT={commit} " in script
    assert "@" not in script
    (root / "a.py").write_text("two")
    with pytest.raises(ValueError, match="commit these first"):
        tree.make(out)


def test_a_process_is_read_while_it_works_and_ended_at_its_limit(tmp_path):
    code = 'import time; print(\'{"name": "a", "status": "ok"}\', flush=True); print(\'noise\', flush=True); time.sleep(60)'
    lines: list[dict] = []
    command = [sys.executable, "-c", code]
    done = run_lines(
        command, limit=5, log=tmp_path / "log", environment={}, take=lines.append, cwd=tmp_path
    )
    assert (done, lines) == (124, [{"name": "a", "status": "ok"}])
    assert "noise" in (tmp_path / "log").read_text()


def test_a_line_that_cannot_be_kept_costs_only_itself(tmp_path):
    lines: list[dict] = []

    def take(line):
        lines.append(line)
        if line["name"] == "a":
            raise KeyError("status")

    command = [sys.executable, "-c", 'print(\'{"name": "a"}\\n{"name": "b"}\')']
    assert (
        run_lines(command, limit=60, log=tmp_path / "log", environment={}, take=take, cwd=tmp_path)
        == 0
    )
    assert [line["name"] for line in lines] == ["a", "b"]
    assert "KeyError: 'status'" in (tmp_path / "log").read_text()


def _run_with(monkeypatch, tmp_path, code: int, *printed: dict) -> Run:
    """A run whose processes print these lines and end with this code; the stages that it began are
    in ``began``."""
    monkeypatch.setattr(runner, "_commit", lambda: "one")
    run = Run(out=tmp_path, budget=300, only="", dry=True)
    run.began = []

    def processes(command, *, take, **_):
        run.began.append(command[2])
        for line in printed:
            take(dict(line))
        return code

    monkeypatch.setattr(runner, "run_lines", processes)
    return run


LOOK = Stage(name="look", run="a", limit=60, module="look")
GOOD, BAD, LEFT_OUT = ({"name": word, "status": word} for word in ("ok", "failed", "skipped"))


@pytest.mark.parametrize(
    ("code", "line", "outcome"),
    [
        (124, GOOD, "out of time"),
        (124, BAD, "failed"),
        (0, LEFT_OUT, "skipped"),
        (0, GOOD, "ok"),
        (3, GOOD, "out of time"),
    ],
)
def test_a_stage_is_called_what_it_was(tmp_path, monkeypatch, code, line, outcome):
    run = _run_with(monkeypatch, tmp_path, code, line)
    assert run._stage(LOOK) == outcome


@pytest.mark.parametrize(
    ("line", "outcome"), [(LEFT_OUT, "skipped"), (GOOD, "ok"), (BAD, "failed")]
)
def test_so_is_a_stage_of_rows(tmp_path, monkeypatch, line, outcome):
    run = _run_with(monkeypatch, tmp_path, 0, {**line, "row": 0})
    row = Row(name="ema", case="ema", op="ema")
    assert run._stage(Stage(name="look", run="a", limit=60, rows=(row,))) == outcome


def test_a_stage_that_dies_is_among_the_faults_with_its_error(tmp_path, monkeypatch):
    run = _run_with(monkeypatch, tmp_path, 1, GOOD)
    text = (
        "Traceback:\n  File a.py, line 3\n    import yaml\n    ^^^^^^\nModuleNotFoundError: yaml\n"
    )
    run._log(LOOK).write_text(text)
    assert run.all([LOOK]) == 1
    died = run.lines[-1]
    assert (died["name"], died["status"]) == ("look", "failed")
    assert died["reason"].startswith("exit 1: ModuleNotFoundError: yaml | before it: Traceback:")
    faults = summary(run.lines, [("look", "failed", 1.0)], {}, "")
    assert any(line.startswith("failed: look: exit 1: ModuleNotFoundError") for line in faults)


def test_what_later_stages_need_is_measured_first_and_kept_for_its_commit(tmp_path, monkeypatch):
    facts = (
        {**GOOD, "name": "environment", "machine": {"gpu": "H100"}},
        {**GOOD, "name": "ceilings", **CEILINGS},
    )
    run = _run_with(monkeypatch, tmp_path, 0, *facts, {**BAD, "op": "ema", "gate": "failed"})
    assert run.all([LOOK]) == 1
    assert run.began == ["benchmarks.gpu.environment", "benchmarks.gpu.ceilings", "look"]
    again = _run_with(monkeypatch, tmp_path, 0, GOOD)
    assert again.all([LOOK]) == 0
    assert again.began == ["look"]
    monkeypatch.setattr(runner, "_commit", lambda: "another")
    kept = Run(out=tmp_path, budget=300, only="", dry=True)._kept
    assert (kept["gates"], kept["machine"], kept["ceilings"]) == ({}, {}, CEILINGS)


def _stage(*names: str) -> Stage:
    small = ("width=8", "depth=1", "hidden=8", "rounds=1")
    options = {
        "good": small,
        "other": small,
        "bad": (*small, "momentum=7"),
        "dead": ("no_such_option=1",),
    }
    return Stage(
        name="sweeps",
        run="b",
        limit=300,
        rows=tuple(Row(name=name, case="ema", op="ema", dry=options[name]) for name in names),
    )


@pytest.mark.slow
def test_a_row_that_fails_costs_only_itself_and_sets_the_exit_code(tmp_path, monkeypatch, capsys):
    stage = _stage("bad", "dead", "good")
    monkeypatch.setattr(rows, "STAGES", (stage,))

    def in_this_process(command, *, take, **_):
        monkeypatch.setattr(sys, "argv", command[2:])
        code = rows.main()
        for text in capsys.readouterr().out.splitlines():
            if text.startswith("{"):
                take(json.loads(text))
        return code

    monkeypatch.setattr(runner, "run_lines", in_this_process)
    run = Run(out=tmp_path, budget=300, only="", dry=True)
    run._kept |= {"machine": {"gpu": "none"}, "ceilings": CEILINGS}
    assert run.all([stage]) == 1
    assert [(line["name"], line["status"]) for line in run.lines] == [
        ("bad", "failed"),
        ("dead", "failed"),
        ("good", "ok"),
    ]
    kept = [json.loads(text) for text in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["name"] for line in kept] == ["bad", "dead", "good"]
    assert kept[2]["gate"] == "not run"
    run._kept["gates"]["ema"] = "failed"
    run.lines.clear()
    assert run.all([stage]) == 1
    assert [(line["name"], line["status"]) for line in run.lines][2] == ("good", "marked")
    assert run.lines[2]["reason"] == "the tests of ema failed"


def test_out_of_time_is_told_from_a_failure(tmp_path, capsys):
    assert Run(out=tmp_path, budget=1, only="", dry=True).all(chosen("b")) == 3
    assert "fused out of time" in capsys.readouterr().out


def test_a_kernel_test_that_fails_closes_its_own_gate_alone(tmp_path, monkeypatch, capsys):
    bad, good = tmp_path / "test_bad.py", tmp_path / "test_good.py"
    bad.write_text("def test_it():\n    assert False\n")
    good.write_text("def test_it():\n    assert True\n")
    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    monkeypatch.setattr(
        kernel_tests, "TESTS_OF", {"one": ("test_bad.py",), "two": ("test_good.py",)}
    )
    monkeypatch.setattr(sys, "argv", ["kernel_tests", "--limit", "100"])
    assert kernel_tests.main() == 1
    lines = [
        json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith("{")
    ]
    assert {line["op"]: line["gate"] for line in lines} == {"one": "failed", "two": "passed"}


def test_a_gate_needs_a_test_that_ran(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_none.py").write_text(
        "import pytest\n\n@pytest.mark.skip\ndef test_it():\n    pass\n"
    )
    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_tests, "TESTS_OF", {"ema": ("test_none.py",)})
    for only, told in (("", ("tests of ema", "not run")), ("no such row", ("tests", None))):
        monkeypatch.setattr(sys, "argv", ["kernel_tests", "--limit", "100", "--only", only])
        assert kernel_tests.main() == 0
        line = next(
            json.loads(text)
            for text in capsys.readouterr().out.splitlines()
            if text.startswith("{")
        )
        assert (line["name"], line.get("gate"), line["status"]) == (*told, "skipped")


def test_a_failure_before_the_time_ran_out_is_one(tmp_path, monkeypatch, capsys):
    slow = "\n\ndef test_slow():\n    import time\n    time.sleep(60)\n"
    (tmp_path / "test_bad.py").write_text(f"def test_it():\n    assert False\n{slow}")
    (tmp_path / "test_good.py").write_text(f"def test_it():\n    assert True\n{slow}")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")
    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    ends = time.monotonic() + 20
    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.map(
            lambda file: kernel_tests.run_file(file, ends), ("test_bad.py", "test_good.py")
        )
    assert (bad[0], good) == (1, (124, "not done in time"))
    assert "test_bad.py::test_it FAILED" in bad[1]
    assert "test_good.py::test_it PASSED" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    assert main() == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_a_dry_run_goes_through_every_stage(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = [json.loads(text) for text in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {stage.name for stage in STAGES}
    assert {row.name for row in ROWS} <= {line["name"] for line in lines}
    assert all(line["dry"] and line["machine"]["torch"] for line in lines[1:])
    end = done.stdout[done.stdout.index("== stages") :].splitlines()
    assert len(end) <= LINES
