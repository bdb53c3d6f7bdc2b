"""What `fastmoco doctor` finds. Probes that crash, hang or lie are small programs here; the real ones run
in this process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmoco.training.checkup import packages, probes, run, surroundings
from fastmoco.training.checkup.findings import MARK, Checkup, Finding
from fastmoco.training.checkup.run import Probe, run_probes

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


def one(script: str, probe: Probe | None = None, *, limit_s: float = 60.0) -> list[Finding]:
    """The findings of one process that runs a script; the words after it are in `sys.argv`."""
    probe = probe or Probe(name="it", title="It", cure="mend it", needed=True)
    return run_probes([probe], "cpu", [sys.executable, "-c", script], limit_s=limit_s)[probe.name]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "its process died of SIGSEGV"),
        ("import ctypes; ctypes.string_at(0)", "its process died of SIGSEGV"),
        ("import os; os._exit(3)", "ended with code 3"),
        ("import sys; sys.exit('libnvjpeg.so.13: not found')", "libnvjpeg.so.13: not found"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("print('x' * 5000); raise SystemExit(1)", "x" * 300),
        ("import sys; sys.stderr.buffer.write(b'\\xff bad\\n'); sys.exit(1)", "\ufffd bad"),
    ],
)
def test_a_probe_that_fails_is_a_finding_with_its_cure(script: str, reason: str) -> None:
    assert one(script) == [
        Finding(name="It", state="broken", text=reason, cure="mend it", needed=True)
    ]


def test_a_failure_without_a_cure_of_its_own_has_one() -> None:
    script = "import sys; sys.exit('why')"
    (found,) = one(script, Probe(name="it", title="It"))
    whole = shlex.join([sys.executable, "-c", script, "it", "cpu"])
    assert found.cure == f"for the whole error: {whole}"
    (found,) = one(script, Probe(name="it", title="It", install="torchao<1"))
    assert found.cure == f"{sys.executable} -m pip install --force-reinstall 'torchao<1'"


def test_a_probe_that_hangs_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    script = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    began = time.monotonic()
    (found,) = one(script, limit_s=2.0)
    assert (found.state, found.text) == ("broken", "did not end within 2 s")
    assert time.monotonic() - began < 60
    child = int((tmp_path / "child").read_text())
    for _ in range(500):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the child of the probe is still there")


def test_a_probe_that_the_system_kills_is_tried_again_alone(tmp_path: Path) -> None:
    """Two that do not fit beside each other, and one that never fits."""
    script = f"""
import json, os, sys, time
name, folder = sys.argv[1], {str(tmp_path)!r}
open(os.path.join(folder, name), "a").write("x")
if name == "large" or os.path.getsize(os.path.join(folder, name)) == 1:
    time.sleep(0.2)
    os.kill(os.getpid(), 9)
print({MARK!r} + json.dumps([{{"name": name, "state": "works", "text": "alone"}}]))
"""
    names = ("one", "two", "large")
    tried = [Probe(name=name, title=name, install="torch", needed=True) for name in names]
    found = run_probes(tried, "cpu", [sys.executable, "-c", script], limit_s=60)
    assert [found[name][0].state for name in names] == ["works", "works", "broken"]
    assert "memory is short" in found["large"][0].text
    assert "docker run --memory" in found["large"][0].cure
    assert [(tmp_path / name).read_text() for name in names] == ["xx"] * 3


def test_what_a_probe_found_counts_although_its_process_crashes_at_its_end() -> None:
    script = f"""
import json, os
print("noise of a library")
print({MARK!r} + json.dumps([{{"name": "It", "state": "works", "text": "fine", "cure": "", "needed": False}}]), flush=True)
os.kill(os.getpid(), 6)
"""
    assert one(script) == [Finding(name="It", state="works", text="fine")]


def test_probes_get_their_name_the_device_and_their_variables() -> None:
    script = f"""
import json, os, sys
text = " ".join([*sys.argv[1:], os.environ["TRITON_INTERPRET"]])
print({MARK!r} + json.dumps([{{"name": "It", "state": "works", "text": text}}]))
"""
    probe = Probe(name="it", title="It", variables={"TRITON_INTERPRET": "0"})
    assert [found.text for found in one(script, probe)] == ["it cpu 0"]


def test_an_interrupt_ends_the_probes_that_run(tmp_path: Path) -> None:
    script = f"""
import sys
from fastmoco.training.checkup import run
sleeper = "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(600)"
run.run_probes([run.Probe(name="it", title="It")], "cpu", [sys.executable, "-c", sleeper], limit_s=600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(2)
    assert process.wait(60) != 0
    stat = Path(f"/proc/{pid.read_text()}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


def _whole(script: str) -> Checkup:
    return run.check_machine(limit_s=60, command=[sys.executable, "-c", script], modules={})


def test_without_torch_nothing_else_is_tried_and_training_cannot_run() -> None:
    found = _whole(
        "import sys; print(sys.argv[1]); sys.exit('ImportError: libtorch.so: too short')"
    )
    assert [entry.name for entry in found.obstacles] == ["torch"]
    assert found.obstacles[0].cure.startswith(f"{sys.executable} -m pip install --force-reinstall ")
    if packages.requirements():  # there is metadata
        assert "torch<2.16,>=2.11" in found.obstacles[0].cure
    assert not {"training", "decoder", "C part"} & {entry.name for entry in found.findings}
    assert found.as_json()["trains"] is False


def test_a_torch_that_is_not_installed_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Finding(name="torch", state="broken", text="not installed", cure="x", needed=True)
    monkeypatch.setattr(run, "package_findings", lambda: [absent])
    found = _whole("import no_such_library")
    assert [entry for entry in found.findings if entry.name == "torch"] == [absent]
    assert not any(entry.name == "training" for entry in found.findings)


def test_what_is_not_needed_may_be_broken() -> None:
    script = f"""
import json, sys
name = sys.argv[1]
if name in ("torch", "training", "decoder"):
    found = [{{"name": name, "state": "works", "text": "fine", "needed": True}}]
    print({MARK!r} + json.dumps(found))
else:
    sys.exit("broken")
"""
    found = _whole(script)
    states = {entry.name: entry.state for entry in found.findings}
    assert states["Triton"] == states["C part"] == "broken"
    assert not found.obstacles
    assert found.as_json()["trains"] is True
    assert found.device == "cpu"


def test_packages_that_cannot_be_imported_are_named_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails for their reason has their cure."""
    (tmp_path / "fine_one.py").write_text("print('noise')")
    (tmp_path / "cut_short.py").write_text("raise ImportError('libx.so: file too short')")
    (tmp_path / "dies_at_once.py").write_text("import os; os.kill(os.getpid(), 11)")
    (tmp_path / "needs_it.py").write_text("import cut_short")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(run, "requirements", list)
    names = {"fine": "fine_one", "cut": "cut_short", "dies": "dies_at_once", "needs": "needs_it"}
    script = "import sys; sys.exit('ImportError: libx.so: file too short')"
    found = run.check_machine(limit_s=60, command=[sys.executable, "-c", script], modules=names)
    cut = f"{sys.executable} -m pip install --force-reinstall cut"
    assert [(entry.name, entry.text, entry.cure) for entry in found.obstacles] == [
        ("cut", "ImportError: libx.so: file too short", cut),
        ("dies", "its process died of SIGSEGV", cut.replace(" cut", " dies")),
        ("torch", "ImportError: libx.so: file too short", cut),
    ]


def test_every_package_that_fastmoco_needs_is_imported() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {packages._parsed(line).name for line in project["dependencies"]}
    assert needed == {*packages.MODULES, "torch"}
    assert all(map(importlib.util.find_spec, packages.MODULES.values()))


def test_this_process_imports_neither_torch_nor_an_optional_library() -> None:
    code = (
        "import sys; import fastmoco.cli.doctor, fastmoco.training.checkup.run as run;"
        "run.python_finding(); list(run.package_findings()); list(run.surroundings());"
        "sys.exit(str({'torch', 'nvidia', 'triton', 'tensorboard', 'torchao'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torch", ("torch", "works", "built for")),
        ("decoder", ("decoder", "works", "decoded eight JPEGs")),
        ("attention", ("attention", "works", "by default sdpa")),
        ("collectives", ("gloo", "works", "summed a tensor")),
        ("training", ("training", "works", "two steps of a tiny ViT in")),
    ],
)
def test_what_every_machine_has_works(name: str, says: tuple[str, str, str]) -> None:
    found = probes.PROBES[name](CPU)[0]
    assert (found.name, found.state) == says[:2]
    assert says[2] in found.text


@pytest.mark.parametrize("there", ["nvidia-dali-cuda120", ""])
def test_the_cure_of_the_decoder_is_that_of_what_decodes(
    monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    monkeypatch.setattr(run, "installed", lambda name: "2.4.0" if name == there else None)
    (decoder,) = (probe for probe in run._others("cpu") if probe.name == "decoder")
    assert (there or "pillow") in decoder.cure


def test_the_c_part_is_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmoco_kernels.cut_views import native

    if native.native_library() is None:
        pytest.skip("needs the compiled part")
    assert probes.probe_c_part(CPU)[0].state == "works"
    kernels = __import__("fastmoco_kernels")
    real = kernels.cut_views
    monkeypatch.setattr(
        kernels,
        "cut_views",
        lambda *a, backend, **k: real(*a, backend=backend, **k) + (backend == "native"),
    )
    with pytest.raises(RuntimeError, match="cuts other views than torch"):
        probes.probe_c_part(CPU)


def test_without_the_c_part_its_cure_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmoco_kernels.cut_views import native

    monkeypatch.setattr(native, "native_library", lambda: None)
    monkeypatch.setattr(surroundings, "compiler", lambda: None)
    (found,) = probes.probe_c_part(CPU)
    assert found.state == "weak"
    assert found.cure.startswith("apt-get install gcc, then ")
    assert "--force-reinstall --no-deps --no-cache-dir" in found.cure or " -e " in found.cure


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (None, "--no-binary fastmoco fastmoco==0.1"),
        ("file:///tmp/fastmoco-0.1-py3-none-any.whl", "--no-binary fastmoco fastmoco==0.1"),
        ("file:///tmp/a%20b/fastmoco-0.1.tar.gz", "'/tmp/a b/fastmoco-0.1.tar.gz'"),
        ("https://example.org/fastmoco-0.1.tar.gz", "https://example.org/fastmoco-0.1.tar.gz"),
        ("git+https://example.org/fastmoco@1a2b", "git+https://example.org/fastmoco@1a2b"),
        ("git+file:///srv/fastmoco@1a2b", "git+file:///srv/fastmoco@1a2b"),
    ],
)
def test_a_cure_installs_again_from_where_it_came(
    origin: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            if origin is None or not origin.startswith("git+"):
                return None if origin is None else json.dumps({"url": origin})
            url, _, commit = origin.removeprefix("git+").rpartition("@")
            return json.dumps({"url": url, "vcs_info": {"vcs": "git", "commit_id": commit}})

    monkeypatch.setattr(packages.fastmoco, "__file__", str(tmp_path / "fastmoco" / "__init__.py"))
    monkeypatch.setattr(packages.fastmoco, "__version__", "0.1")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    again = f"{sys.executable} -m pip install --force-reinstall --no-deps --no-cache-dir"
    assert packages.reinstall(from_source=True) == f"{again} {words}"


def test_the_other_apex_is_told_from_nvidias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("apex", None)
    (found,) = probes.probe_apex(CPU)
    assert found.state == "weak"
    assert "is another project of that name" in found.text
    assert found.cure == f"{sys.executable} -m pip uninstall apex"


def test_a_driver_that_torch_cannot_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "version"
    driver.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release\n"
    )
    monkeypatch.setattr(probes, "_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    gpu = probes.probe_torch(CPU)[1]
    assert (gpu.name, gpu.state, gpu.needed) == ("GPU", "broken", False)
    assert "driver 580.95.05 has one" in gpu.text
    assert "built for CPUs" in gpu.text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert probes.probe_torch(CPU)[1].cure == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.13.0+cpu", "<2.16,>=2.11", True),
        ("2.16.0", "<2.16,>=2.11", False),
        ("2.15.9", "<2.16,>=2.11", True),
        ("2.11", "<2.16,>=2.11", True),
        ("2.10.0", "<2.16,>=2.11", False),
        ("1.26", ">=1.26", True),
        ("1.3", "!=1.3.0", False),
        ("26.10", ">=26.9", True),
        ("3", "", True),
        ("unknown", ">=1", False),
    ],
)
def test_versions_are_compared_by_number(version: str, bounds: str, fits: bool) -> None:
    assert packages.satisfies(version, bounds) is fits


def test_versions_are_compared_as_the_library_for_it_does() -> None:
    specifiers = pytest.importorskip("packaging.specifiers")
    for version in ("0.9", "1.0", "1.0.1", "1.10", "2.0", "2.0.0", "10.0"):
        for bound in ("1", "1.0", "1.9", "2.0", "2"):
            for sign in (">=", "<=", ">", "<", "==", "!="):
                wanted = specifiers.SpecifierSet(sign + bound).contains(version)
                assert packages.satisfies(version, sign + bound) is wanted, (version, sign + bound)


def _distribution(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], lines: list[str]
) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)


def test_packages_that_are_missing_old_or_impostors_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        "torch<2.16,>=2.11",
        "numpy (>=1.26)",
        "rich>=13",
        'torchao<1,>=0.18; extra == "float8"',
        'fastmoco[cuda13]; extra == "dali-cu13"',
        'nvidia-dali-cuda130<3,>=2.4; extra == "cuda13"',
        'pytest>=9; extra == "dev"',
    ]
    versions = {
        **{"torch": "2.9.1", "numpy": "2.4.6", "torchao": "0.9", "nvidia-dali": "0.1"},
        **{"nvidia-dali-cuda130": "2.4.0", "nvidia-dali-cuda120": "2.4.0", "pytest": "1"},
    }
    _distribution(monkeypatch, versions, lines)
    found = {entry.name: entry for entry in packages.package_findings()}
    assert set(found) == {"torch", "rich", "torchao", "nvidia-dali", "DALI twice"}
    assert found["torch"].text == "2.9.1, but fastmoco needs <2.16,>=2.11"
    assert not found["torch"].needed
    assert found["torch"].cure == f"{sys.executable} -m pip install 'torch<2.16,>=2.11'"
    assert found["rich"].needed
    assert found["rich"].text == "not installed"
    assert "a placeholder" in found["nvidia-dali"].text


def test_the_quota_of_control_groups_is_the_smallest(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (groups / "a" / "b").mkdir(parents=True)
    assert surroundings.cpu_quota(proc=tmp_path / "none", cgroups=groups) is None
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    assert surroundings.cpu_quota(proc=proc, cgroups=groups) is None
    (groups / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (groups / "a" / "cpu.max").write_text("150000 100000\n")
    (groups / "cpu.max").write_text("400000 100000\n")
    assert surroundings.cpu_quota(proc=proc, cgroups=groups) == 1.5
    (proc / "self" / "cgroup").write_text("4:cpu,cpuacct:/c\n3:memory:/c\n")
    (groups / "cpu" / "c").mkdir(parents=True)
    (groups / "cpu" / "c" / "cpu.cfs_quota_us").write_text("50000\n")
    (groups / "cpu" / "c" / "cpu.cfs_period_us").write_text("100000\n")
    assert surroundings.cpu_quota(proc=proc, cgroups=groups) == 0.5


def test_a_machine_without_a_place_for_temporary_files_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    found = run.check_machine(limit_s=1.0)
    assert [entry.name for entry in found.obstacles] == ["temporary files"]
    assert "TMPDIR" in found.obstacles[0].cure


def test_little_of_something_is_a_note_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "free_host_bytes", lambda: 2**30)
    monkeypatch.setattr(surroundings, "cpu_quota", lambda: 0.5)
    monkeypatch.setattr(surroundings, "LITTLE_DISK", 2**60)
    monkeypatch.setattr(surroundings, "LITTLE_SHARED", 2**60)
    monkeypatch.setattr(surroundings, "compiler", lambda: None)
    monkeypatch.setattr(surroundings.resource, "getrlimit", lambda _: (256, 4096))
    found = {entry.name: entry for entry in surroundings.surroundings()}
    assert {name for name, entry in found.items() if entry.state == "weak"} >= {
        *("CPU", "memory", "disk", "open files")
    }
    assert found["open files"].cure == "ulimit -n 1024"
    assert found["CPU"].cure.startswith("set OMP_NUM_THREADS=1,")
    assert found["C compiler"].cure == "apt-get install gcc g++"
    assert not any(entry.needed for entry in found.values())

    # A limit that this process cannot raise, and a system that does not tell its memory.
    monkeypatch.setattr(surroundings.resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(surroundings, "free_host_bytes", lambda: {}["MemAvailable"])
    found = {entry.name: entry for entry in surroundings.surroundings()}
    assert "docker run --ulimit nofile=1024" in found["open files"].cure
    assert (found["memory"].state, found["memory"].text) == (
        "weak",
        "what is free cannot be told: 'MemAvailable'",
    )


def test_the_command_prints_a_table_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.command_line import main

    made = Checkup(
        device="cpu",
        findings=(
            Finding(name="torch", state="works", text="2.13.0"),
            Finding(name="decoder", state="broken", text="died", cure="pip it", needed=True),
            Finding(name="apex", state="absent", text="not installed"),
        ),
    )
    asked: list[float] = []
    monkeypatch.setattr(run, "check_machine", lambda *, limit_s: asked.append(limit_s) or made)
    assert main(["doctor", "--seconds", "5"]) == 1
    text = capsys.readouterr().out
    assert "ok     torch    2.13.0\n" in text
    assert "FAULT  decoder  died\n                cure: pip it\n" in text
    assert text.endswith("training cannot run here: decoder\n")
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == made.as_json()
    assert asked == [5.0, 90.0]
    assert main(["doctor", "--seconds", "0"]) == 2
    assert "--seconds 0" in capsys.readouterr().err


def test_the_version_is_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    import fastmoco
    from tests.command_line import main

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastmoco.__version__"}
    assert main(["--version"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"fastmoco {fastmoco.__version__} (Python ")
    assert f"torch {importlib.metadata.version('torch')}" in line
    assert line.count("\n") == 1


@pytest.mark.long
def test_doctor_finds_that_training_can_run_here(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastmoco", "doctor", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
    )
    found = json.loads(done.stdout)
    broken = [entry for entry in found["findings"] if entry["state"] == "broken"]
    assert (done.returncode, found["trains"], broken) == (0, True, [])
    assert list(tmp_path.iterdir()) == []
