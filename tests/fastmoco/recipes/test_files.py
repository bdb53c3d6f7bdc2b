"""Configs in files: YAML, TOML and JSON are read as the options are, or refused with the line."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("yaml", reason="PyYAML is not installed")
pytest.importorskip("tyro", reason="tyro is not installed")

import yaml

from fastmoco.cli.config_text import _quoted, _yaml_value, config_text
from fastmoco.config import Config
from fastmoco.config.documents import read_document
from fastmoco.config.serial import to_json
from fastmoco.recipes import RECIPES, get_recipe
from fastmoco.recipes.files import is_config_file, read_config
from fastmoco_pipelines.files.small import UnfitFileError


def written(folder: Path, text: str | bytes, name: str = "my.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read_config(path)
    return str(caught.value).replace(f"{path}", "FILE")


@pytest.mark.parametrize("how", ["yaml", "toml", "json"])
def test_every_recipe_is_read_as_it_was_written(how, tmp_path: Path) -> None:
    for name in RECIPES:
        config = get_recipe(name)
        path = written(tmp_path, config_text(config, how, comments=False), f"{name}.{how}")
        assert read_config(path) == config, name


@pytest.mark.parametrize("recipe", ["dino_vit_s16_e100_b512", "supervised_vit_s16"])
@pytest.mark.parametrize("how", ["yaml", "toml"])
def test_comments_change_nothing_and_other_readers_find_the_same_values(
    recipe: str, how: str, tmp_path: Path
) -> None:
    config = get_recipe(recipe)
    text = config_text(config, how)
    assert read_config(written(tmp_path, text, f"a.{how}")) == config
    read = yaml.safe_load(text) if how == "yaml" else tomllib.loads(text)
    expected = json.loads(json.dumps(to_json(config)))
    if how == "toml":  # which has no null
        assert read["optim"]["final_weight_decay"] in (0.4, "none")
        read["optim"]["final_weight_decay"] = expected["optim"]["final_weight_decay"]
        assert read["data"]["shuffle_window"] == "none"
        read["data"]["shuffle_window"] = None
    assert read == expected
    assert "# Passes over the training images" in text
    assert max(map(len, text.splitlines())) <= 100


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_is_quoted_so_that_both_formats_read_it(text: str) -> None:
    assert tomllib.loads(f"a = {_quoted(text)}") == {"a": text}
    assert yaml.safe_load(f"a: {_yaml_value(text)}") == {"a": text}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_stays_a_number_for_other_readers(number: float) -> None:
    assert yaml.safe_load(f"a: {_yaml_value(number)}") == {"a": number}


def test_a_file_may_name_a_recipe_and_what_differs(tmp_path: Path) -> None:
    base = get_recipe("quickstart_digits")
    expected = replace(base, epochs=7, optim=replace(base.optim, lr=1e-3, betas=(0.9, 0.95)))
    texts = {
        "a.yaml": "recipe: quickstart_digits\nepochs: 7\noptim:\n  lr: 1e-3\n  betas: [.9, 0.95]\n",
        "b.yml": "recipe: quickstart_digits\nepochs: 7\noptim: {lr: 1E-3, betas: [9e-1, 0.95]}",
        "c.toml": 'recipe = "quickstart_digits"\nepochs = 7\noptim.lr = 1e-3\n'
        "optim.betas = [0.9, 0.95]\n",
        "d.json": '{"recipe": "quickstart_digits", "epochs": 7, '
        '"optim": {"lr": 0.001, "betas": [0.9, 0.95]}}',
        "e.yaml": "\ufeffrecipe: quickstart_digits\nx: &x\n".replace("x: &x\n", "")
        + "optim: &o\n  lr: 1e-3\n  betas: [0.9, 0.95]\nepochs: 7\n",
    }
    for name, text in texts.items():
        assert read_config(written(tmp_path, text, name)) == expected, name
    assert read_config(written(tmp_path, "epochs: 70")) == replace(Config(), epochs=70)
    supervised = read_config(written(tmp_path, "objective: {kind: byol}"))
    assert supervised.objective.kind == "byol"


def test_words_without_quotes_have_the_type_of_their_field(tmp_path: Path) -> None:
    """YAML 1.1 would read a text, false, a date, 8 and a number of base 60."""
    config = read_config(
        written(
            tmp_path,
            "recipe: dino_digits\n"
            "knn: {holdout: 10%}\n"
            "optim: {weight_decay: 5e-2, final_weight_decay: none}\n"
            "data: {shards: 2024-01-01, shuffle_window: null, synthetic: true}\n"
            "model: {init: no, compile: False, keep_tokens: 0.5}\n"
            "batch: {chunk: none, kept: 12, activation_budget: 1}\n"
            "seed: 1_000\n".replace("knn: {holdout: 10%}\n", ""),
        )
    )
    assert (config.optim.weight_decay, config.optim.final_weight_decay) == (0.05, None)
    assert (config.data.shards, config.data.shuffle_window) == ("2024-01-01", None)
    assert config.data.synthetic is True
    assert (config.model.init, config.model.compile, config.model.keep_tokens) == (
        "no",
        False,
        "0.5",
    )
    assert (config.batch.chunk, config.batch.kept, config.batch.activation_budget) == (
        "none",
        12,
        1,
    )
    assert config.seed == 1000


def test_aliases_and_merged_groups_are_read(tmp_path: Path) -> None:
    text = (
        "recipe: quickstart_digits\n"
        "data:\n"
        "  view1: &view\n    crop_scale: [0.5, 1]\n    flip_probability: 0\n"
        "  view2:\n    <<: *view\n    flip_probability: 0.25\n"
    )
    data = read_config(written(tmp_path, text)).data
    assert data.view1.crop_scale == data.view2.crop_scale == (0.5, 1)
    assert (data.view1.flip_probability, data.view2.flip_probability) == (0, 0.25)


def test_views_follow_the_image_size_as_with_the_option(tmp_path: Path) -> None:
    start = "recipe: vit_s16_e300_b1024\nmodel: {image_size: 112}\n"
    assert read_config(written(tmp_path, start)).data.view2.size == 112
    both = start + "data: {view1: {size: 96}, view2: {size: 96}}\n"
    assert refusal(written(tmp_path, both)) == (
        "FILE:3: data.view1.size: got 96: must be model.image_size=112"
    )


def test_paths_are_meant_as_on_the_command_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = "recipe: quickstart_digits\ndata: {shards: '~/digits/*.tar'}\nknn: {test_shards: a/b}"
    config = read_config(written(tmp_path, text))
    assert config.data.shards == "/home/me/digits/*.tar"
    assert config.knn.test_shards == "a/b"


REFUSED = {
    "epochs: ten": "FILE:1: epochs: got ten, must be a number",
    "epochs: '10'": "FILE:1: epochs: got the text '10', must be a number",
    "epochs: [1]": "FILE:1: epochs: got a list, must be a number",
    "seed: 1.0": "FILE:1: seed: got 1.0, must be a whole number",
    "seed: 010": "FILE:1: seed: got 010, must be a whole number; some readers take a leading zero "
    "for base 8: leave it out",
    "optim: {lr: 012}": "FILE:1: optim.lr: got 012, must be a number; some readers take a leading",
    "seed: 1:30": "FILE:1: seed: got 1:30, must be a whole number",
    "seed: true": "FILE:1: seed: got true, must be a whole number",
    "epochs: .inf": "FILE:1: epochs: got inf: must be finite",
    "epochs: -1\n": "FILE:1: epochs: got -1: must be positive",
    "recipe: quickstart_digits\n\noptim:\n  lr: -1": "FILE:4: optim.lr: got -1: must not be negative",
    "recipe: vit_s16_e300_b1024\nepochs: 1": "FILE: optim.warmup_epochs: got 40 (of recipe "
    "vit_s16_e300_b1024): must be at most epochs=1",
    "epochs: 1\noptim: {warmup_epochs: 2}": "FILE:2: optim.warmup_epochs: got 2: must be at most",
    "epoch: 3": "FILE:1: unknown key epoch; did you mean epochs?",
    "optim: {lrr: 3}": "FILE:1: unknown key optim.lrr; did you mean optim.lr",
    "Optim: {lr: 3}": "FILE:1: unknown key Optim; did you mean optim?",
    "modl: {image_size: 96}": "FILE:1: unknown key modl; did you mean model?",
    "data: {view: {size: 96}}": "FILE:1: unknown key data.view; did you mean data.view",
    "lr: 3": "FILE:1: unknown key lr; did you mean optim.lr?",
    "optim.lr: 3": "FILE:1: unknown key optim.lr; write lr below optim:",
    "out: runs/a": "FILE:1: unknown key out; it is an option of the command, --out",
    "optim: 3": "FILE:1: optim: got 3, must be a group of names and values",
    "optim: {betas: 0.9}": "FILE:1: optim.betas: got 0.9, must be a list of 2 numbers, e.g. [1, 1]",
    "optim: {betas: [0.9]}": "FILE:1: optim.betas: got 1, must be a list of 2 numbers, e.g. [1, 1]",
    "optim: {betas: [a, 1]}": "FILE:1: optim.betas: got a in a list, must be a list of 2 numbers",
    "optim: {betas: '(0.9, 0.95)'}": "FILE:1: optim.betas: got the text '(0.9, 0.95)', must be",
    "optim: {name: adam}": "FILE:1: optim.name: got adam, must be one of adamw, lars, lamb, sgd, "
    "larc; did you mean adamw?",
    "model: {compile: yes}": "FILE:1: model.compile: got yes, must be auto or true or false; write "
    "true or false",
    "data: {shards: }": "FILE:1: data.shards: got no value, must be a text, '' if it is empty",
    "data: {more_views: 3}": "FILE:1: data.more_views: got 3, must be a list of groups",
    "recipe: quickstart_digit": "FILE:1: recipe quickstart_digit does not exist; did you mean "
    "quickstart_digits?",
    "recipe: [a]": "FILE:1: recipe: got a list, must be the name of a recipe",
    "recipe: dino_digits\nobjective:\n  kind: byol": "FILE:3: objective.kind: got byol, but recipe "
    "dino_digits has dino",
    "objective: {kind: byyol}": "FILE:1: objective.kind: got byyol; known are byol,",
    "seed: 1\nepochs: 2\nseed: 1": "FILE:3: seed is given twice, first in line 1",
    "optim:\n\tlr: 3": "FILE:2: not YAML: found character '\\t' that cannot start any token; indent",
    "optim: {lr: 3": "FILE:1: not YAML: ",
    "a: !!python/object/apply:os.system [ls]": "FILE:1: the tag !!python/object/apply:os.system is",
    "!!python/name:os.system seed: 3": "FILE:1: the tag !!python/name:os.system is not read",
    "seed: !mine 3": "FILE:1: the tag !mine is not read; leave it out",
    "a: &a [*a]": "FILE:1: contains itself by an alias",
    "&a optim: &b {lr: *b}": "FILE:1: contains itself by an alias",
    "---\nseed: 1\n---\nseed: 2": "FILE:3: not YAML: expected a single document in the stream, but "
    "found another document",
    "trackers: {use: wandb}": "FILE:1: trackers.use: got wandb, must be a list of texts, e.g. [wandb]",
    "recipe:\nseed: 1": "FILE:1: recipe: got no value, must be the name of a recipe",
    "data: {more_views: [{size: 96}, {size: 80}, {size: 96}]}": "FILE:1: data.view1, view2 and "
    "more_views: got (224, 224, 96, 80, 96): sizes",
    "? [a, b]\n: 1": "FILE:1: a name must be one word",
    "- seed": "FILE: must have names and values, as in `recipe: NAME`",
    "seed": "FILE: must have names and values",
    "": "FILE: is empty; the least is one line, `recipe: NAME`",
    "# nothing\n": "FILE: is empty",
    "{}": "FILE: is empty",
    "seed: \x00": "FILE:1: \\x00 is no character of YAML",
    "<<: 3": "FILE:1: << merges groups with names alone",
    "a: *b": "FILE:1: not YAML: found undefined alias 'b'",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_is_told_with_line_and_key(text: str, tmp_path: Path) -> None:
    assert refusal(written(tmp_path, text)).startswith(REFUSED[text])


TWINS = '{"seed": 1,\n "optim": {"lr": 1, "lr": 2}}'
OTHERS = {
    "a.toml": {
        "seed = 1\n[optim]\nlr = 'x'\n": "FILE:3: optim.lr: got the text 'x', must be a number",
        "seed = 1\nseed = 2\n": "FILE:2: not TOML: ",
        "[data]\n[[data.more_views]]\nsize=96\n[[data.more_views]]\nsze=96": "FILE:5: unknown key "
        "data.more_views.1.sze; did you mean data.more_views.1.size?",
        "seed = 1979-05-27": "FILE:1: seed: got 1979-05-27, must be a whole number",
        "seed = ": "FILE:1: not TOML: ",
        "seed = " + "9" * 5000: "FILE: not TOML: Exceeds the limit",
        "": "FILE: is empty",
    },
    "a.json": {
        '{"seed": 1,\n "optim": {"betas": [1],\n "lr": null}}': "FILE:2: optim.betas: got 1, must",
        '{"data": {"more_views": [{}, {"copies": 1,\n"size": "3"}]}}': "FILE:2: data.more_views.1."
        "size: got the text '3', must be a whole number",
        '{"optim": {"lr": null}}': "FILE:1: optim.lr: got null, must be a number",
        TWINS: "FILE: lr has two values",
        '{"seed": NaN}': "FILE: NaN is no finite number",
        "[1]": "FILE: must be an object of JSON, with names",
        "{": "FILE: line 1, column 2: not JSON",
        "[" * 100_000: "FILE: ",
    },
    "a.txt": {"seed: 1": "FILE: must end in .yaml, .yml, .toml, .json"},
    "b.yaml": {
        "[" * 3000: "FILE:1: is nested too deeply",
        "[\n" * 70 + "]" * 70: "FILE:65: is nested",
    },
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n in OTHERS for t in OTHERS[n]])
def test_a_mistake_in_another_format_is_told_too(name: str, text: str, tmp_path: Path) -> None:
    assert refusal(written(tmp_path, text, name)).startswith(OTHERS[name][text])


def test_all_mistakes_are_told_at_once_up_to_a_number(tmp_path: Path) -> None:
    lines = refusal(written(tmp_path, "seed: a\nepochs: b\nlr: 3")).split("\n  ")
    assert [line[:8] for line in lines] == ["FILE:1: ", "FILE:2: ", "FILE:3: "]
    many = "".join(f"key{number}: 1\n" for number in range(50))
    lines = refusal(written(tmp_path, many)).split("\n  ")
    assert len(lines) == 21
    assert lines[-1] == "and 30 more"


def test_aliases_of_aliases_are_counted(tmp_path: Path) -> None:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for number in range(1, 12):
        laughs += f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n"
    assert "has more than 20,000 values, aliases counted" in refusal(written(tmp_path, laughs))


def test_odd_files_are_refused(tmp_path: Path) -> None:
    assert refusal(written(tmp_path, b"seed: 1\nrecipe: \xff")) == (
        "FILE: line 2, byte 16: 0xff is not UTF-8 text"
    )
    assert "bytes" in refusal(written(tmp_path, "# " + "x" * 300_000))
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    assert "a named pipe" in refusal(pipe)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "none.yaml")
    assert refusal(tmp_path) == "FILE: is a folder; give a file"


def test_the_config_of_a_run_is_read_and_its_folder_named(tmp_path: Path) -> None:
    config = replace(get_recipe("swav_crops_digits"), recipe="of another version")
    run = {"config": to_json(config), "run_id": "0" * 14}
    path = written(tmp_path, json.dumps(run), "config.json")
    assert read_config(path) == config
    assert refusal(tmp_path) == "FILE: is a folder; give FILE/config.json"
    run["config"]["optim"]["lrr"] = 1
    written(tmp_path, json.dumps(run), "config.json")
    assert "config.optim" in refusal(path)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("quickstart_digits", False),
        ("quickstart_digit", False),
        ("my.yaml", True),
        ("MY.YML", True),
        ("a/b", False),
        ("", False),
        ("runs/first/config.json", True),
    ],
)
def test_a_file_is_known_by_its_name(word: str, expected: bool) -> None:
    assert is_config_file(word) is expected


def test_a_folder_hides_no_recipe_of_a_similar_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dino", "here", "quickstart_digits"):
        (tmp_path / name).mkdir()
    assert [is_config_file(name) for name in ("dino", "here", "quickstart_digits")] == [
        False,
        True,
        False,
    ]


def test_lines_of_json_are_those_of_its_keys(tmp_path: Path) -> None:
    text = '{"a": {"b": 1,\n "c": [1,\n {"d": "x,{\\"\\n"}]},\n\n "e": null}'
    lines = read_document(written(tmp_path, text, "a.json")).lines
    assert lines[("a", "b")] == 1
    assert lines[("a", "c")] == 2
    assert lines[("a", "c", 1, "d")] == 3
    assert lines[("e",)] == 5


def test_a_refusal_is_a_value_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UnfitFileError, match=r"is empty"):
        read_config(written(tmp_path, ""))
