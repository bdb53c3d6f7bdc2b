"""What a loader leaves out is what `data check` lists, whatever an index has let in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastmoco_pipelines.errors import StructureError
from fastmoco_pipelines.formats import index as index_module
from fastmoco_pipelines.formats.headers import structure
from fastmoco_pipelines.formats.images import ImageHeader, size_problem
from fastmoco_pipelines.formats.index import build_index, write_index
from fastmoco_pipelines.formats.quarantine import NAME, Quarantine, quarantine_path
from fastmoco_pipelines.inspecting import check as check_module
from fastmoco_pipelines.inspecting.check import check_shards
from fastmoco_pipelines.loading.eval_loader import build_eval_loader
from fastmoco_pipelines.spec import EvalLoaderSpec, EvalSpec
from fastmoco_pipelines.views.decode_child import Decoder
from tests.pipelines import quick_pool
from tests.pipelines.image_corpus import BAD, BOMBS, GARBLED, GOOD, HEIGHT, WIDTH
from tests.pipelines.slow_images import SLOW

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
CONTENT = GOOD | GARBLED | BOMBS | {name: data for name, (data, _) in (BAD | SLOW).items() if data}
NAMES = {f"{i:03d}.{name.rpartition('.')[2]}": name for i, name in enumerate(CONTENT)}


def believed(data: bytes) -> ImageHeader:
    """What an index says that was made by other rules: any file is an image."""
    try:
        found = structure(data)
    except StructureError:
        return ImageHeader("jpg", HEIGHT, WIDTH)
    if size_problem(height=found.height, width=found.width, size=len(data)):
        return ImageHeader("jpg", HEIGHT, WIDTH)
    return ImageHeader("jpg", found.height, found.width)


@pytest.fixture(scope="module")
def everything(tmp_path_factory, write_tar) -> Path:
    """A tar of the whole corpus, whose index lists all of it."""
    members = [(member, CONTENT[name]) for member, name in NAMES.items()]
    tar = write_tar(tmp_path_factory.mktemp("all") / "all.tar", members)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "read_header", believed)
        index = build_index(tar)
    assert len(index) == len(CONTENT)
    write_index(tar, index)
    return tar


def left_out(listed: Path) -> dict[str, str]:
    """Reasons by name in the corpus."""
    return {
        NAMES[f"{entry.key}.{entry.extension}"]: entry.reason for entry in Quarantine.read(listed)
    }


def test_a_loader_leaves_out_what_the_check_lists(everything, tmp_path, monkeypatch) -> None:
    image = EvalSpec(size=8, resize=8)
    spec = EvalLoaderSpec(
        shards=str(everything), image=image, batch_size=16, threads=1, max_bad_share=1.0
    )
    with build_eval_loader(spec, quarantine_list=tmp_path / NAME) as loader:
        loader.report = lambda text: None
        delivered = sum(len(batch.sample_ids) for batch in loader)
    by_loader = left_out(tmp_path / NAME)
    assert delivered == len(GOOD | GARBLED)
    assert set(by_loader) == {*BAD, *BOMBS, *SLOW} - {"zero_bytes.jpg"}

    # The check, with the decoder in this process: of garbled images its child alone hears.
    monkeypatch.setattr(check_module, "DecodePool", quick_pool.QuickPool)
    monkeypatch.setattr(quick_pool, "Blind", Decoder)
    check_shards(str(everything))
    by_check = left_out(quarantine_path(everything.parent))
    os.unlink(quarantine_path(everything.parent))
    assert set(by_check) == set(by_loader)
    for name in SLOW:
        same = by_check[name] in by_loader[name] or "declares" in by_loader[name]
        assert same or SLOW[name][1] == "unsupported format"
