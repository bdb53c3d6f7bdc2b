"""Every format and every damage: the same verdict from the check, from the loader's own engine, and
again on a rerun."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.errors import ImageRefusedError
from fastmoco_pipelines.formats.images import read_header, rgb_image, structure_fault
from fastmoco_pipelines.formats.index import build_index, write_index
from fastmoco_pipelines.formats.quarantine import Quarantine, quarantine_path
from fastmoco_pipelines.inspecting.check import check_shards
from fastmoco_pipelines.inspecting.preview import save_view_grid
from fastmoco_pipelines.making.pack import pack_folder
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import EvalSpec, ViewSpec
from fastmoco_pipelines.views.dali import EvalPipeline
from fastmoco_pipelines.views.decode_child import Decoder
from fastmoco_pipelines.views.decode_pool import DecodePool, Item
from tests.pipelines.image_corpus import (
    BAD,
    BOMBS,
    GARBLED,
    GOOD,
    HEIGHT,
    JPEG,
    SCAN,
    WIDTH,
    flipped,
)
from tests.pipelines.odd_images import REFUSED, SAME_AS
from tests.pipelines.slow_images import SLOW

EXPECTED = (
    dict.fromkeys(GOOD, "")
    | {name: kind for name, (_, kind) in (BAD | SLOW).items()}
    | dict.fromkeys(GARBLED, "garbled image")
    | dict.fromkeys(BOMBS, "too large or a bomb")
)
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
CONTENT = GOOD | {name: data for name, (data, _) in (BAD | SLOW).items()} | GARBLED | BOMBS
NAMES = {f"{i:03d}.{name.rpartition('.')[2]}": name for i, name in enumerate(CONTENT)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, write_tar):
    members = [(member, CONTENT[name]) for member, name in NAMES.items()]
    return write_tar(tmp_path_factory.mktemp("corpus") / "corpus.tar", members)


@pytest.fixture(scope="module")
def reports(corpus):
    """Without an index, twice; then with one."""
    fresh = [check_shards(str(corpus), workers=workers, quarantine=False) for workers in (1, 2)]
    write_index(corpus, build_index(corpus))
    return [*fresh, check_shards(str(corpus), workers=2)]


def test_the_corpus_is_large_enough():
    assert len(CONTENT) >= 47
    assert len(BOMBS) == 5


def test_every_file_gets_its_verdict_again_and_again(reports):
    for report in reports:
        found = {NAMES[fault.member]: fault.kind for fault in report.faults}
        assert found == {name: kind for name, kind in EXPECTED.items() if kind}
        assert report.delivered == len(GOOD)
        assert report.promised == report.delivered + report.quarantined
        assert report.promised + report.left_out == len(CONTENT)
        assert report.restarts == 0
    assert [(f.member, f.kind) for f in reports[0].faults] == [
        (f.member, f.kind) for f in reports[1].faults
    ]


def test_what_the_header_lets_through_is_quarantined(reports, corpus):
    """Exactly the samples that an index lists and a loader cannot deliver."""
    listed = {f.member for f in reports[2].faults if f.outcome == "quarantined"}
    quarantine = Quarantine.read(quarantine_path(corpus.parent))
    assert {f"{entry.key}.{entry.extension}" for entry in quarantine} == listed
    assert {NAMES[name] for name in listed} == {
        "cut_half.jpg",
        "no_end_mark.jpg",
        "only_header.jpg",
        "wrong_checksum.png",
        "flipped.png",
        *GARBLED,
    }
    with ShardSet.open(str(corpus)) as shards:
        assert len(shards) + reports[2].left_out == len(CONTENT)


def test_the_loaders_engine_says_the_same(reports):
    """The bytes of each file through the pipeline that training and evaluation decode with, one at
    a time."""
    from fastmoco_pipelines.spec import EvalSpec
    from fastmoco_pipelines.views.dali import DecodeError, EvalPipeline

    pipeline = EvalPipeline(EvalSpec(size=8, resize=8), batch_size=1, threads=1)
    reasons = {NAMES[fault.member]: fault.reason for fault in reports[2].faults}
    for name, data in CONTENT.items():
        faults: tuple[tuple[int, str], ...] | None = None
        try:
            pipeline.run([np.frombuffer(data, np.uint8)])
        except DecodeError as refused:
            faults = refused.faults
        if faults is None:  # of a garbled image the check alone hears the warning
            assert EXPECTED[name] in ("", "garbled image"), name
            continue
        assert EXPECTED[name], name
        # By the header alone, in the same words; those about other formats have a cure, too.
        if faults and EXPECTED[name] in ("too large or a bomb", "damaged image", "animation"):
            assert faults == ((0, reasons[name]),)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_from_their_header(name):
    """Nothing is decoded, nothing large is allocated: the work does not grow with the size that is
    declared."""
    data = BOMBS[name]
    assert structure_fault(data)
    tracemalloc.start()
    with pytest.raises(ImageRefusedError, match=r"above the limit|bomb"):
        read_header(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def reference(data: bytes) -> np.ndarray:
    """Pillow's pixels as RGB of 8 bits: alpha dropped, 16 bits scaled, EXIF not applied."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64) / 257
        return np.repeat(levels[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB")).astype(np.float64)


# CMYK has no one conversion to RGB; everything else is the same library or lossless. The 16-bit RGB
# image is compared with Pillow, which keeps the upper byte.
TOLERANCE = {"cmyk.jpg": 3.0, "grey_16.png": 1.0, "rgb_16.png": 1.0}


@pytest.mark.parametrize("name", GOOD)
def test_pixels_are_those_of_pillow(name):
    pixels = Decoder().decode(GOOD[name])
    wanted = reference(GOOD[name])
    assert pixels.shape == wanted.shape
    assert np.abs(pixels - wanted).max() <= TOLERANCE.get(name, 0.0)


def test_an_exif_rotation_is_not_applied():
    assert Decoder().decode(GOOD["rotated.jpg"]).shape == (HEIGHT, WIDTH, 3)


def test_a_flipped_bit_that_decodes_is_caught_by_its_checksum(tmp_path, write_tar):
    """A JPEG's scan has no checksum of its own: decoders deliver garbage without a word, crc32 does
    not."""
    bad = flipped(JPEG, SCAN + 400)
    path = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("b.jpg", JPEG)])
    write_index(path, build_index(path))
    raw = path.read_bytes()
    at = raw.rindex(JPEG)
    path.write_bytes(raw[:at] + bad + raw[at + len(bad) :])
    Decoder().decode(bad)
    report = check_shards(str(path), workers=1)
    assert report.delivered + report.quarantined == report.promised == 2
    assert [fault.member for fault in report.faults if fault.kind == "changed bytes"] == ["b.jpg"]


def test_a_decoder_out_of_memory_costs_one_sample(tmp_path):
    """A child with no room left refuses, and the next image is decoded."""
    from fastmoco_pipelines.views.decode_pool import ChildLimits
    from tests.pipelines.image_corpus import encode, picture

    large, small = encode(picture(height=4000, width=5000), "PNG"), GOOD["png.png"]
    path = tmp_path / "images"
    path.write_bytes(large + small)
    items = [Item(str(path), 0, len(large)), Item(str(path), len(large), len(small))]
    with DecodePool(1, ChildLimits(memory_bytes=40 << 20)) as pool:
        first, second = pool.run(items)
    assert first.kind in ("damaged image", "crash")
    assert first.reason
    assert second.kind == ""


def test_what_is_packed_decodes_in_training_to_the_pixels_of_the_plain_file(tmp_path, capfd):
    """Through the real commands: packed, found clean by the check, decoded by the loader's engine,
    and nothing that a library prints about metadata reaches the console."""
    (tmp_path / "src").mkdir()
    for name, (data, _) in (SAME_AS | REFUSED).items():
        (tmp_path / "src" / name).write_bytes(data)
    report = pack_folder(tmp_path / "src", tmp_path / "out")
    assert {name for name, _ in report.skipped} == set(REFUSED)
    assert report.samples == len(SAME_AS)
    assert check_shards(report.pattern, workers=1, quarantine=False).clean

    # One bilinear view of each, to the bit that of the file without odd surroundings.
    spec = EvalSpec(size=32, resize=40)
    engine = EvalPipeline(spec, batch_size=len(SAME_AS), threads=1)
    decoder = Decoder()
    with ShardSet.open(report.pattern) as shards:
        encoded = shards.read(np.arange(len(shards)))
        bases = dict(SAME_AS.values())
        views = engine.run(encoded)
        plain = engine.run([np.frombuffer(bases[bytes(data)], np.uint8) for data in encoded])
        assert (views == plain).all()
        for data in encoded:
            base = decoder.decode(bases[bytes(data)]).copy()
            assert np.array_equal(decoder.decode(bytes(data)), base)
            assert np.array_equal(np.asarray(rgb_image(bytes(data))), base)
    save_view_grid(report.pattern, (ViewSpec(size=16),) * 2, tmp_path / "views.png", rows=8)
    assert capfd.readouterr() == ("", "")
