"""The pictures and tables of a report, of a small real run and of damaged ones."""

from __future__ import annotations

import base64
import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmoco.checkpoint import list_checkpoints
from fastmoco.distributed.mesh import World
from fastmoco.run.report.reading import read_run
from fastmoco.training import report_facts, report_pictures
from fastmoco.training.trainer import Trainer
from tests.reported_runs import write_run


@pytest.fixture(scope="module")
def trained(brief_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "run"
    config = replace(brief_run, epochs=1)
    trainer = Trainer.build(config, folder, World())
    try:
        trainer.run()
    finally:
        trainer.close()
    return folder


def test_the_pictures_of_a_run(trained, monkeypatch) -> None:
    monkeypatch.setattr(report_pictures, "MOST_IMAGES", 80)
    found = report_pictures.make_pictures(read_run(trained))
    assert [len(row) for row in found.views.rows] == [3] * report_pictures.PAIRS
    assert [len(row) for row in found.neighbours.rows] == [1 + report_pictures.NEIGHBOURS] * 8
    assert [row[1].caption for row in found.attention.rows] == ["all heads"] * 6
    assert found.features is not None
    assert len(found.features.x) == 80
    assert found.features.method == "PCA"  # too few for t-SNE
    for row in (*found.views.rows, *found.neighbours.rows, *found.attention.rows):
        for tile in row:
            content = base64.b64decode(tile.source.partition("base64,")[2])
            assert max(Image.open(io.BytesIO(content)).size) <= report_pictures.SIDE
            assert tile.alt


def test_neighbours_are_the_most_similar_and_never_the_query(trained, monkeypatch) -> None:
    monkeypatch.setattr(report_pictures, "MOST_IMAGES", 64)
    seen = {}
    plain = report_pictures.neighbours

    def kept(found):
        seen["found"], seen["tiles"] = found, plain(found)
        return seen["tiles"]

    monkeypatch.setattr(report_pictures, "neighbours", kept)
    report_pictures.make_pictures(read_run(trained))
    rows = seen["found"].rows
    similar = rows @ rows.T
    similar.fill_diagonal_(-2)
    queries = report_pictures._one_of_each(seen["found"], report_pictures.QUERIES)
    wanted = similar[queries].topk(report_pictures.NEIGHBOURS).values
    shown = [[float(tile.caption.split()[-1]) for tile in row[1:]] for row in seen["tiles"].rows]
    torch.testing.assert_close(torch.tensor(shown), wanted, atol=0.006, rtol=0)


def test_what_is_lost_is_named_and_the_rest_stands(trained, tmp_path: Path) -> None:
    # Without the images: no picture, and one sentence each.
    run = read_run(trained)
    found = report_pictures.make_pictures(run, shards=str(tmp_path / "gone-*.tar"))
    assert "gone-*.tar" in found.views.why
    assert found.features is None

    # Without the held-out images: those of the training, and a sentence about it.
    config = dict(run.config)
    config["knn"] = {**config["knn"], "test_shards": str(tmp_path / "held-*.tar")}
    told: list[str] = []
    moved = replace(run, saved={**run.saved, "config": config})
    found = report_pictures.make_pictures(moved, tell=told.append)
    assert "training images with their cosines" in found.neighbours.note
    assert any("held-*.tar" in text for text in told)

    # With a damaged checkpoint: the views alone.
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for path in list_checkpoints(copy / "checkpoints"):
        file = path / "tensors.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    found = report_pictures.make_pictures(read_run(copy))
    assert len(found.views.rows) == report_pictures.PAIRS
    for why in (found.neighbours.why, found.attention.why, found.no_features):
        assert why.startswith("No checkpoint can be read: ")
        assert why.count("\n") == 0

    # Without a config: everything is named.
    (copy / "config.json").write_text("{")
    assert "cannot be read" in report_pictures.make_pictures(read_run(copy)).views.why


def test_an_encoder_without_class_token_has_no_attention_map() -> None:
    class Source:
        encoder = torch.nn.Identity()

    with pytest.raises(ValueError, match="Identity, which has no class token"):
        report_pictures.attention_maps(None, Source())  # type: ignore[arg-type]


def test_the_tables(trained, tmp_path: Path) -> None:
    run = read_run(trained)
    table = report_facts.checkpoint_table(run)
    assert [row[0] for row in table.rows] == ["3", "5"]
    assert report_facts.newest_checkpoint(run).name == "step_00000005"
    cut = run.folder.checkpoints / "step_00000003" / "state.json"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])
    try:
        states = [row[-1] for row in report_facts.checkpoint_table(run).rows]
    finally:
        cut.write_bytes(whole)
    assert states[0].startswith(f"damaged: state.json has {len(whole) - 1:,} bytes in place of")
    assert states[1] == "committed by 1 rank"
    values = dict(report_facts.environment_table(run).rows)
    assert values["torch"] == torch.__version__
    assert values["device"] == "cpu"

    bare = read_run(write_run(tmp_path / "bare"))
    assert report_facts.checkpoint_table(bare).why == "The run has saved no checkpoint yet."
    (bare.folder.path / "checkpoints" / "step_00000007").mkdir(parents=True)
    (row,) = report_facts.checkpoint_table(bare).rows
    assert row[0] == "7"
    assert row[-1].startswith("damaged: ")
    saving = report_facts.checkpoint_table(replace(bare, state="running"))
    assert saving.rows == []


def test_the_mfu_is_flops_by_the_peak(trained) -> None:
    from fastmoco.config.serial import from_json
    from fastmoco.planning.costs import count_step

    run = read_run(trained)
    assert report_facts.speed_facts(run, "") == []
    (said,) = report_facts.speed_facts(run, "h100")
    config = from_json(dict(run.config))
    flops = count_step(config, str(run.resolved["precision"]), 64).flops / 64
    assert f"{flops / 1e9:.3g} GFLOPs an image" in said
    with pytest.raises(ValueError, match="must be one of"):
        report_facts.speed_facts(run, "Z80")
