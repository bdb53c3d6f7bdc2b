"""Every cure that a refusal of a training command names: the fault is made, the cure is taken from
the message itself and done, and the command goes on. (`data` commands: test_data_cures.py.)"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastmoco.checkpoint import folder as checkpoint_folder
from fastmoco.cli.agent import describe_start
from fastmoco.config.launched import describe_launcher, read_launcher
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.objectives.build import build_objective
from fastmoco.recipes import with_image_size
from fastmoco.run.folder import RunFolder
from fastmoco.training.initial_weights import start_from
from fastmoco.training.state import require_finite
from tests.command_line import main
from tests.official_checkpoints import official_checkpoint, official_vit
from tests.step_runs import short_run

pytest.importorskip("tyro", reason="tyro is not installed")
pytestmark = pytest.mark.faults

SMALL = (
    "train quickstart_digits --epochs 0.2 --optim.warmup-epochs 0 --global-batch-size 32 "
    "--device cpu --threads 1 --knn.test-shards= --checkpoint.every-steps 1"
)
FINISHED = "this run is finished already"
ALLOW = r"give (--allow [\w. ]+) if you mean it"


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory) -> Path:
    """A run of two steps, with a checkpoint of each; tests work on a copy."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastmoco.cli.train.draw_curves", lambda *_: None)
        patch.setattr("torch.cpu.get_capabilities", dict)  # `auto` is fp32
        assert main([*SMALL.split(), "--data.shards", digits[1], "--out", str(out)]) == 0
    return out


@dataclass
class Walk:
    """A run on its way from a fault to its cure.

    Attributes:
        out: its folder.
        whole: an intact copy of it.
        shards: that it is trained on.
        words: added to its command.
    """

    out: Path
    whole: Path
    shards: str
    other_shards: str
    capsys: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch
    words: list[str] = field(default_factory=list)

    def say(self, *words: str) -> tuple[int, str]:
        """Exit code and all that a command prints."""
        code = main(list(words))
        printed = self.capsys.readouterr()
        return code, printed.out + printed.err

    def train(self) -> tuple[int, str]:
        given = ["--data.shards", self.shards, "--out", str(self.out), *self.words]
        return self.say(*SMALL.split(), *given)

    def refused(self, cure: str) -> re.Match[str]:
        """The cure in the message of a refused start."""
        code, text = self.train()
        assert code == 2, text
        return found(text, cure)

    def goes_on(self) -> str:
        code, text = self.train()
        assert code == 0, text
        return text

    def checkpoint(self, step: int) -> Path:
        return self.out / "checkpoints" / f"step_{step:08d}"

    def forge(self, step: int, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """A checkpoint that agrees with its marker, made of that of the first step."""
        loaded = load_checkpoint(self.checkpoint(1))
        tensors = loaded.tensors
        change(tensors)
        shutil.rmtree(self.checkpoint(step), ignore_errors=True)
        root = loaded.path.parent
        save_checkpoint(root, step=step, tensors=tensors, state=loaded.state, keep=9)


def found(text: str, pattern: str) -> re.Match[str]:
    match = re.search(pattern, text)
    assert match is not None, (pattern, text)
    return match


@pytest.fixture
def walk(finished, digits, tmp_path, capsys, monkeypatch) -> Walk:
    monkeypatch.setattr("fastmoco.cli.train.draw_curves", lambda *_: None)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    return Walk(out, finished, digits[1], digits[0], capsys, monkeypatch)


# The config of a run.


def test_fields_that_may_change(walk):
    walk.words = ["--optim.lr", "0.1", "--optim.weight-decay", "0.2"]
    walk.words += shlex.split(walk.refused(ALLOW)[1])
    assert FINISHED in walk.goes_on()


def test_a_group_of_fields_that_may_change(walk):
    """It is in the list of the fields that can."""
    walk.words = ["--data.view1.blur-probability", "0.3", "--allow", "seed"]
    can = walk.refused(r"fields that can: (.*)")[1].split(", ")
    walk.words[-1] = next(name for name in can if "data.view1.blur_probability".startswith(name))
    assert FINISHED in walk.goes_on()


def test_another_precision(walk):
    """`auto` finds another one on another machine, or it is given."""
    walk.patch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    cure = walk.refused(r"give (--precision \w+)\)")[1].split()
    walk.words = ["--precision", "bf16"]
    assert walk.refused(r"give (--precision \w+)\)")[1].split() == cure
    walk.words = cure
    assert FINISHED in walk.goes_on()


# Checkpoints.


def test_checkpoints_of_another_run(walk):
    (walk.out / "config.json").unlink()
    walk.words = [walk.refused(r"add (--trust) to continue from it")[1]]
    assert FINISHED in walk.goes_on()


@pytest.mark.parametrize("cure", ["put back", "move away"])
def test_damaged_checkpoints(cure, walk):
    for step in (1, 2):
        (walk.checkpoint(step) / "state.json").write_text("{}")
    match = walk.refused(r"or move (\S+) away to start from scratch")
    root = Path(match[1])
    if cure == "put back":
        found(match.string, r"Put back an intact copy of one of these folders")
        name = found(match.string, r"Restore (step_\d+) from a copy")[1]
        shutil.rmtree(root / name)
        shutil.copytree(walk.whole / "checkpoints" / name, root / name)
        assert FINISHED in walk.goes_on()
    else:
        root.rename(walk.out.with_name("away"))
        assert "finished after 2 steps" in walk.goes_on()


def whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.startswith("model.encoder.blocks.0"))
    tensors[name] = tensors[name].view(torch.int32)


def one_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith("exp_avg_sq"))]


def test_all_that_is_found_while_a_run_is_built(walk):
    """One after the other: other images, a full disk, and the newest two checkpoints."""
    walk.words = ["--epochs", "0.4", "--allow", "epochs"]
    own, walk.shards = walk.shards, walk.other_shards
    walk.refused(r"point --data.shards at the original set")
    walk.shards = own

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_folder, "write_text", full)
        walk.refused(r"No space left on device.*; free space or choose another --out")

    for step, change in enumerate((whole_numbers, one_missing), 2):
        walk.forge(step, change)
    cure = r"restore (step_\d+) from a copy, or remove it to continue from an earlier checkpoint"
    for step in (3, 2):
        path = walk.out / "checkpoints" / walk.refused(cure)[1]
        assert path == walk.checkpoint(step)
        shutil.rmtree(path)
    assert "continuing from step_00000001" in walk.goes_on()


def test_a_file_in_the_place_of_checkpoints(walk):
    root = walk.out / "checkpoints"
    root.rename(walk.out.with_name("away"))
    root.write_text("a file")
    path = walk.refused(r"cannot write checkpoints to (\S+): .*; move it away")[1]
    Path(path).rename(walk.out.with_name("file"))
    walk.out.with_name("away").rename(root)
    assert FINISHED in walk.goes_on()


def test_a_state_that_is_not_finite(walk):
    with pytest.raises(RunError) as refused:
        require_finite({"weight": torch.tensor(float("nan"))})
    cures = re.findall(r"(--\S+) \(and (--allow \S+)\)", str(refused.value))
    assert len(cures) == 2
    for option, allowed in cures:
        walk.words += [option, "0.0001", *allowed.split()]
    # Of two `--allow` the last one counts, so the refusal names all fields.
    walk.words += shlex.split(walk.refused(ALLOW)[1])
    assert FINISHED in walk.goes_on()


def test_a_checkpoint_that_no_run_wrote(walk):
    """Two cures, one after the other."""
    tensors = {"weight": torch.zeros(2)}
    save_checkpoint(walk.out / "checkpoints", step=3, tensors=tensors, state={}, keep=9)
    walk.words = [walk.refused(r"add (--trust) to continue from it")[1]]
    path = walk.refused(r"fastmoco: (\S+): no run wrote .*; move it away")[1]
    Path(path).rename(walk.out.with_name("away"))
    walk.words = []
    assert FINISHED in walk.goes_on()


# The folder of a run.


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def hard_link(path: Path) -> None:
    path.with_name("twin").write_text("")
    path.hardlink_to(path.with_name("twin"))


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


FILES: dict[str, Callable[[Path], None]] = {
    "lock": pipe,
    "config.json": sparse,
    "metrics.jsonl": hard_link,
    "quarantine.jsonl": link,
    "starts.json": socket_file,
    "curves.png": Path.mkdir,
    "DONE": link,
    "PREEMPTED": pipe,
}
ACTIONS = {
    "move it away": lambda path: path.rename(path.with_name(f"away-{path.name}")),
    "remove it": Path.unlink,
    "replace it by a copy of its own": lambda path: (
        path.rename(path.with_name("old")),
        shutil.copy(path.with_name("old"), path),
    ),
    "fix it": Path.rmdir,
}


def test_what_is_in_the_place_of_files(walk):
    """All at once: each message leads to the next, until the run goes on."""
    for name, put in FILES.items():
        (walk.out / name).unlink(missing_ok=True)
        put(walk.out / name)
    cured = []
    walk.words = ["--trust"]
    while (said := walk.train())[0] == 2:
        match = found(said[1], rf"(/\S+?): .*?({'|'.join(ACTIONS)})")
        ACTIONS[match[2]](Path(match[1]))
        cured.append(Path(match[1]).name)
        assert len(cured) <= len(FILES), said[1]
    assert sorted(cured) == sorted(FILES)
    assert FINISHED in said[1]


def test_what_is_in_the_place_of_the_folder(walk):
    run, walk.out = walk.out, walk.out.with_name("other")
    walk.out.symlink_to("nowhere")
    Path(walk.refused(r"(/\S+): leads to no folder; move it away")[1]).unlink()
    walk.out.write_text("a file")
    Path(walk.refused(r"(/\S+): is a file where a folder is due; move it away")[1]).unlink()
    run.rename(walk.out)
    assert FINISHED in walk.goes_on()


def test_a_folder_in_use(walk):
    other = RunFolder(walk.out)
    other.acquire()
    owner = walk.refused(r"is in use by process (\d+); wait for it or choose another --out")[1]
    assert int(owner) == os.getpid()
    other.release()
    assert FINISHED in walk.goes_on()


def test_starts_without_progress(walk):
    (walk.out / "starts.json").write_text('{"launch": "a launcher", "step": 2, "starts": 3}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_RESTART_COUNT", "4")
        walk.refused(r"Run the same command by hand to try again")
    assert FINISHED in walk.goes_on()


# Variables.

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TASK = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
VARIABLES = [
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "0"},
    {"WORLD_SIZE": "-1"},
    {"RANK": "3"},
    {"RANK": "3", "WORLD_SIZE": "2", **MEETING},
    {"LOCAL_RANK": "1", "WORLD_SIZE": "1"},
    {"LOCAL_WORLD_SIZE": "0"},
    {"RANK": "abc", "LOCAL_RANK": "x"},
    {"TORCHELASTIC_RESTART_COUNT": "abc"},
    {"SLURM_RESTART_COUNT": "-1"},
    {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"},
    {name: value for name, value in TASK.items() if name != "SLURM_JOB_ID"},
    TASK,
    TASK | {"SLURM_NTASKS": str(1 << 21)},
    TASK | {"SLURM_STEP_NUM_TASKS": str(1 << 21), "SLURM_NTASKS": "1"},
    TASK | {"SLURM_JOB_NODELIST": "n1", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    {"PMI_SIZE": "2", "PMI_RANK": "0", "MV2_COMM_WORLD_SIZE": "3", "MV2_COMM_WORLD_RANK": "1"},
]


@pytest.mark.parametrize("given", VARIABLES, ids=lambda given: "-".join(given))
def test_variables_of_launchers(given):
    left = dict(given)
    for _ in range(3):
        try:
            read_launcher(left)
            break
        except ValueError as error:
            name = found(str(error), r"unset (both|[A-Z0-9_]+)")[1]
            for one in ("RANK", "WORLD_SIZE") if name == "both" else (name,):
                left.pop(one)  # it is there
    read_launcher(left)
    assert left != given


BELOW = (
    {"TORCHELASTIC_RUN_ID": "x"},
    TASK | {"SLURM_STEP_NUM_TASKS": "2"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    {"RANK": "0", "WORLD_SIZE": "2"},
)


def test_processes_of_a_launcher_below_another_one(walk):
    walk.words = ["--gpus", "2"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in BELOW[0].items():
            patch.setenv(name, value)
        said = walk.refused(r"but (.*); omit it under torchrun or srun, or unset the variables")[1]
    assert said == describe_launcher(BELOW[0])
    for given in BELOW:
        left = dict(given)
        while said := describe_launcher(left):
            before, left = left, {name: left[name] for name in left if name not in said}
            assert left != before


def test_variables_of_the_environment(walk):
    """All at once."""
    given = {
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "OMP_NUM_THREADS": "many",
        "MKL_NUM_THREADS": "0",
        "WORLD_SIZE": "2",
        "RANK": "x",
    }
    for name, value in given.items():
        walk.patch.setenv(name, value)
    for _ in given:
        walk.patch.delenv(walk.refused(r"unset ([A-Z_]+)")[1])
    assert FINISHED in walk.goes_on()


def test_fewer_gpus_than_processes():
    """Both ways that the message names."""
    for gpus, device in ((1, "auto"), (0, "gpu")):
        with pytest.raises(RunError) as refused:
            describe_start(4, device, gpus)
        cures = re.findall(r"--(gpus|device) (\w+)", str(refused.value).partition(";")[2])
        assert cures
        for option, value in cures:
            processes = int(value) if option == "gpus" else 4
            describe_start(processes, value if option == "device" else device, gpus)


# The encoder of a run, and weights to start from.


def test_files_of_a_run(walk):
    run, encoder = str(walk.out), str(walk.out / "encoder.safetensors")
    command = ["checkpoint", "consolidate", run, "--encoder", "--out", encoder]
    for best in (run, str(walk.checkpoint(2))):  # no accuracy; one checkpoint already
        code, text = walk.say(*command[:2], best, *command[3:], "--best")
        assert code == 2
        found(text, "or leave out (--best)|(--best) needs the folder of a run")
    assert walk.say(*command)[0] == 0
    code, text = walk.say(*command)
    assert code == 2
    found(text, "choose another --out")
    assert walk.say(*command[:-1], f"{encoder}.2")[0] == 0

    # Options that do not belong to a file.
    embed = ["eval", "embed", encoder, "--shards", walk.shards, "--out"]
    out = str(walk.out / "features.npz")
    more = ["--which", "momentum", "--heads", "5", "--best"]
    for cure in (
        "(--best) needs the folder",
        "leave out (--which .*), or",
        "leave out (--heads .*)",
    ):
        code, text = walk.say(*embed, out, *more)
        assert code == 2
        left_out = found(text, cure)[1].split()
        at = more.index(left_out[0])
        assert more[at : at + len(left_out)] == left_out
        more = more[:at] + more[at + len(left_out) :]
    assert walk.say(*embed, out, *more)[0] == 0
    code, text = walk.say(*embed, out)
    assert code == 2
    found(text, "exists; choose another file")
    code, text = walk.say(*embed, str(walk.out / "features.txt"))
    assert code == 2
    ending = found(text, r"must end in (\.\w+)")[1]
    assert walk.say(*embed, str(walk.out / f"other{ending}"))[0] == 0


def test_a_linear_classifier(walk, tmp_path, monkeypatch):
    command = ["eval", "linear", str(walk.out), "--train", walk.shards, "--test", walk.shards]
    out = ["--out", str(walk.out / "linear.json")]
    needed = (
        [],
        [*out, "--lr", "0.1", "0.2"],
        [*out, "--copies", "1"],
        [*out, "--precision", "bf16"],
    )
    cures = set()
    for more in needed:
        code, text = walk.say(*command, *more)
        assert code == 2
        cures.add(found(text, r"(?:give|needs?) (--fast)")[1])
    (fast,) = cures
    own = ["--epochs", "1", "--lr", "0.1", "0.2", "--copies", "1", "--precision", "bf16"]
    assert walk.say(*command, *own, "--cache", str(walk.out / "cache"), fast)[0] == 0

    # Without a folder of one's own, features that were used longest ago leave it.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = tmp_path / "fastmoco" / "features" / "classifiers-0123456789abcdef"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"0")
    os.utime(old, (1e9, 1e9))
    space = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: space._replace(free=bool(not old.exists())))
    code, text = walk.say(*command, *own, fast)
    assert code == 0
    assert re.search(
        r"features: \d caches? of features, used longest ago, removed \(0\.0 GB\)", text
    )
    assert not old.exists()


def test_weights_of_another_encoder(tmp_path):
    """The message about each difference leads to the next."""
    path = tmp_path / "weights.pth.tar"
    vit = official_vit(grid=2, patch=4, positions=torch.randn(1, 5, 64))
    del vit["cls_token"]
    vit["pos_embed"] = vit["pos_embed"][:, 1:]
    names = {f"module.base_encoder.{name}": tensor for name, tensor in vit.items()}
    whole = official_checkpoint("vit")
    others = {n: t for n, t in whole["state_dict"].items() if "base_encoder.head" in n}
    torch.save({**whole, "state_dict": names | others}, path)

    model: dict[str, Any] = {"architecture": "vit_micro", "positions": "sincos"}
    for _ in range(5):
        config = short_run("cpu", init=str(path), **model)
        config = with_image_size(config, 8, patch_size=model.get("patch_size", 2))
        try:
            started = start_from(config, build_objective(config, torch.device("cpu")), World())
            break
        except CheckpointError as error:
            field, value = found(str(error), r"give --model\.([\w-]+) (\w+)").groups()
            model[field.replace("-", "_")] = int(value) if value.isdigit() else value
    assert started is not None
    assert len(started.fit.matched) > 20
    assert model.keys() == {"architecture", "patch_size", "pooling", "positions"}


# Options.

TO_PRINT = [
    "quickstart_digts",
    "quickstart_digits --optim.lrr 0.1",
    "quickstart_digits -optim.lr 0.1",
    "quickstart_digits --model.no-zero-residual",
    "quickstart_digits --model.zero-residual True",
    "quickstart_digits --model.linears float8 --model.compile False "
    "--model.checkpointing selective",
    "quickstart_digits --model.blocks fused --model.drop-path 0.1 --model.compile True",
    "quickstart_digits --model.mlp-norm batch --model.blocks fused --model.keep-tokens 0.5",
    "quickstart_digits --model.architecture resnet_nano --model.pooling mean "
    "--model.blocks fused --model.checkpointing selective",
    "quickstart_digits --data.images a --data.shards b",
    "quickstart_digits --data.images a --knn.test-shards c --knn.holdout 10%",
    "--optim.lr 0.1 quickstart_digts",
]


def cured(words: list[str], message: str) -> list[str]:
    """The words of a refused command, as its message says."""
    text = message.splitlines()[0].removeprefix("fastmoco: ")
    option = text.partition(" ")[0].removesuffix(":")
    if match := re.search(
        r"(?:unknown option|recipe|command) '?([^';]+)'?.*did you mean (.*?)( or |\?)", text
    ):
        return " ".join(words).replace(match[1], match[2], 1).split()
    if "(of the recipe)" in text:
        words = [*words, option, ""]
    at = words.index(option)
    values = 1 if at + 1 < len(words) and not words[at + 1].startswith("--") else 0
    if "give one of" in text:
        return words[:at] + words[at + 1 + values :]
    if match := re.search(r"long options have two dashes, (\S+)", text):
        return [*words[:at], match[1], *words[at + 1 :]]
    if match := re.search(r"it takes no value; give (\S+) or", text):
        return [*words[:at], match[1], *words[at + 2 :]]
    if match := re.search(r"did you mean (\w+)\?", text):
        return [*words[:at], option, match[1], *words[at + 2 :]]
    if match := re.search(r"(?:take|use|requires|give) (--\S+)(?: (\w+))?", text):
        if match[1] in words:  # it replaces the value
            at = words.index(match[1])
            return [*words[: at + 1], match[2], *words[at + 2 :]]
        kept = words if not match[1].startswith("--model.zero") else words[:at] + words[at + 1 :]
        return [*kept, *filter(None, match.groups())]
    match = found(text, r"use (\w+)")
    return [*words[: at + 1], match[1], *words[at + 2 :]]


@pytest.mark.parametrize("words", TO_PRINT)
def test_options(words, walk):
    """Each message leads to the next, until the config is printed."""
    command = ["print-config", *words.split()]
    refused = 0
    while (said := walk.say(*command))[0] == 2:
        refused += 1
        assert refused < 8, said
        after = cured(command, said[1])
        assert after != command, said
        command = after
    assert refused
