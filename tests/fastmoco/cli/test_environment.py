"""Switches of the environment that undo a safeguard; what is written down holds no secret; the lock
names no impostor."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.cli.environment import clean_environment
from fastmoco.config import Config
from fastmoco.config.serial import from_json, to_json
from fastmoco.run.folder import RunFolder
from tests.command_line import main

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "verb", [["train", "quickstart_digits"], ["checkpoint", "list", "."], ["recipes"]]
)
def test_the_switch_that_lets_torch_unpickle_is_refused(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert main(verb) == 2
    assert "unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in capsys.readouterr().err


def test_switches_of_other_readers_are_dropped_and_nothing_else() -> None:
    environment = {
        "GOPEN_REWRITE": "a=pipe:b",
        "WDS_SECURE": "0",
        "WDS_X": "",
        "HOME": "/root",
        "OMP_NUM_THREADS": "1",
    }
    clean_environment(environment)
    assert environment == {"HOME": "/root", "OMP_NUM_THREADS": "1"}
    clean_environment(environment | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"})


@pytest.mark.parametrize("value", ["abc", "0", "-1", "1000000000", "2,", "1e3", "\x1b[2J"])
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
def test_a_number_of_threads_that_a_library_would_choke_on_is_refused(name, value) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* must be a whole number from 1 to 1,024"):
        clean_environment({name: value})


@pytest.mark.parametrize("value", ["", " ", "4", "4,2", "4, 2", " 8 "])
def test_a_number_of_threads_is_taken(value) -> None:
    clean_environment({"OMP_NUM_THREADS": value})


def test_a_limit_of_threads_may_be_large() -> None:
    clean_environment({"OMP_THREAD_LIMIT": "2147483647"})
    with pytest.raises(ValueError, match="OMP_THREAD_LIMIT='many'"):
        clean_environment({"OMP_THREAD_LIMIT": "many"})


def test_a_program_that_calls_a_command_keeps_its_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "src:.")
    monkeypatch.setenv("PATH", f".:{os.environ['PATH']}")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    before = dict(os.environ)
    for words in (["recipes"], ["--nothing"]):
        main(words)
        assert dict(os.environ) == before


SECRET = "planted-token"
URLS = [
    f"https://user:{SECRET}@host/a-{{0..3}}.tar",
    f"https://host/a.tar?X-Amz-Signature={SECRET}",
]


@pytest.mark.parametrize("url", URLS)
def test_no_dump_of_a_config_holds_a_secret(small_run: Config, tmp_path: Path, url: str) -> None:
    knn = replace(small_run.knn, train_shards=url, test_shards=url)
    config = replace(small_run, data=replace(small_run.data, shards=url), knn=knn)
    dump = to_json(config)
    assert SECRET not in json.dumps(dump)
    assert "https://host/a" in dump["data"]["shards"]
    assert from_json(dump).optim == config.optim
    folder = RunFolder(tmp_path)
    folder.write_config({"config": dump})
    assert SECRET not in (tmp_path / "config.json").read_text()


def test_print_config_hides_the_secret_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["print-config", "quickstart_digits", "--data.shards", URLS[0]]) == 0
    assert SECRET not in capsys.readouterr().out


def test_a_local_pattern_keeps_its_question_mark(small_run: Config) -> None:
    config = replace(small_run, data=replace(small_run.data, shards="/data/train-00?.tar"))
    assert from_json(to_json(config)) == config


IMPOSTORS = {
    "apex",
    "nvidia-dali",
    "moco",
    "moco-v3",
    "pytorch-triton",
    "torch-triton",
    "nvidia-apex",
    "dali",
}
"""Names that an index gives to somebody else's project, or to a placeholder."""


def test_no_package_is_asked_for_by_a_name_that_is_not_its_own() -> None:
    words = [
        line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()
    ]
    words += re.findall(r'"([A-Za-z][\w.-]*)[<>=~!\[;]', (ROOT / "pyproject.toml").read_text())
    names = {re.split(r"[<>=~!\[; ]", word)[0].lower().replace("_", "-") for word in words if word}
    assert {"torch", "nvidia-dali-cuda130", "numpy"} <= names
    assert not names & IMPOSTORS


def test_every_line_of_the_lock_is_one_exact_version() -> None:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    loose = [
        line
        for line in lines
        if line and not line.startswith("#") and not re.fullmatch(r"[\w.-]+==[\w.+!-]+", line)
    ]
    assert not loose
