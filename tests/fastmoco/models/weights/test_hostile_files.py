"""Files of weights that are forged: every one is refused by its name, in bounded memory and time."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastmoco.checkpoint import CheckpointError
from fastmoco.checkpoint.torch_file import read_torch
from fastmoco.models.encoder_file import load_encoder
from fastmoco.models.weights.building import describe, load_foreign
from fastmoco.models.weights.foreign import find_encoder
from fastmoco.models.weights.reading import RawWeights, read_weights
from tests.hostile_pickles import HOSTILE
from tests.official_checkpoints import official_vit

pytestmark = pytest.mark.faults

Members = dict[str, bytes]


def members_of(content: Any) -> Members:
    """The members of an archive of torch, by name."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(members: Members, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def refused(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_weights(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(2, dtype=torch.int64)}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_everything_that_a_training_saves_is_read(tmp_path: Path, new: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    content = {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "transposed": torch.arange(12).reshape(3, 4).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
        "others": [
            b"abc",
            torch.Size([1]),
            torch.device("cpu"),
            torch.float16,
            {1, 2},
            2**60,
            -1.5,
        ],
        "sparse": torch.ones(2, 2).to_sparse(),
    }
    path = tmp_path / "w.pth"
    torch.save(content, path, _use_new_zipfile_serialization=new)
    found = read_torch(path)
    assert list(found) == list(content)
    assert isinstance(content["state_dict"], OrderedDict)
    for name, tensor in content["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor)
        assert found["state_dict"][name].dtype == tensor.dtype
    assert torch.equal(found["transposed"], torch.arange(12).reshape(3, 4).t())
    assert found["float8"].dtype == torch.float8_e4m3fn
    assert found["empty"].shape == (0, 4)
    assert found["others"][5:] == [2**60, -1.5]


def changed_table(change: Callable[[bytes], bytes]) -> bytes:
    members = members_of(WEIGHTS)
    table = next(name for name in members if name.endswith("data.pkl"))
    return archive_of(members | {table: change(members[table])})


def patched(data: bytes, at: int, value: bytes) -> bytes:
    """A field of the first entry of the list of members, with another value."""
    start = data.index(b"PK\1\2") + at
    return data[:start] + value + data[start + len(value) :]


def twins(data: bytes) -> bytes:
    """Two entries of the list that point to one member."""
    first = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", first + 4)
    return data[: second + 42] + data[first + 42 : first + 46] + data[second + 46 :]


SOUND = archive_of(members_of(WEIGHTS))
FILES: dict[str, tuple[bytes, str]] = {
    "compressed": (archive_of(members_of(WEIGHTS), zipfile.ZIP_DEFLATED), "is compressed"),
    "a bomb": (
        archive_of({"a/data.pkl": b"\x80\x02" + b"N" * (16 << 20)}, zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "encrypted": (patched(SOUND, 8, b"\1"), "encrypted"),
    "a member of 4 GB": (patched(SOUND, 20, b"\xfe\xff\xff\xff" * 2), "outside of it"),
    "a member of another size": (patched(SOUND, 24, b"\1\0\0\0"), "compressed"),
    "a member beyond the end": (patched(SOUND, 42, b"\xff\xff\xff\x7f"), "outside of it"),
    "two in one place": (twins(SOUND), "its members overlap"),
    "a list of 4 GB": (SOUND[:-10] + b"\xff\xff\xff\xff" + SOUND[-6:], "not where it says"),
    "a comment": (SOUND[:-2] + b"\4\0abcd", "does not end with a list of its members"),
    "no table": (archive_of({"a/data": b"", "a/version": b"3"}), "no data.pkl"),
    "a table above": (archive_of({"../../data.pkl": b"N."}), "no data.pkl"),
    "two tables": (archive_of({"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "no data.pkl"),
    "big-endian": (
        archive_of({name.replace("x", "x"): b"big" if "byteorder" in name else data
                    for name, data in members_of(WEIGHTS).items()}),
        "not little-endian",
    ),
    "a longer storage": (
        archive_of({name: data + b"more" if "/data/" in name else data
                    for name, data in members_of(WEIGHTS).items()}),
        "has not the bytes of its numbers",
    ),
    "no storages": (
        archive_of({n: d for n, d in members_of(WEIGHTS).items() if "/data/" not in n}),
        "has not the bytes of its numbers",
    ),
    # w: 2 x 3, strides 3 and 1; `K` is a number of one byte.
    "more rows": (changed_table(lambda t: t.replace(b"K\2K\3\x86", b"K\3K\3\x86")), "beyond its"),
    "other strides": (changed_table(lambda t: t.replace(b"K\3K\1\x86", b"K\4K\1\x86")), "beyond"),
    "no strides": (changed_table(lambda t: t.replace(b"K\3K\1\x86", b"K\3\x85")), "no shape"),
    "a negative side": (
        changed_table(lambda t: t.replace(b"K\2K\3\x86", b"J\xff\xff\xff\xffK\3\x86")), "no shape",
    ),
    "a side of text": (
        changed_table(lambda t: t.replace(b"K\2K\3\x86", b"X\1\0\0\0aK\3\x86")), "no shape",
    ),
    "a side of 2^62": (
        changed_table(lambda t: t.replace(b"K\2K\3\x86", b"\x8a\x08" + b"\xff" * 7 + b"\x3fK\3\x86")),
        "beyond its",
    ),
    "another storage": (
        changed_table(lambda t: t.replace(b"FloatStorage", b"LargeStorage")), "torch.LargeStorage",
    ),
    "no storage": (changed_table(lambda t: t.replace(b"storage", b"notable")), "no storage"),
    "a tar": (b"", "cannot be read"),
    "nothing": (b"", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_forged_archive_is_refused(tmp_path: Path, name: str) -> None:
    data, words = FILES[name]
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    if name == "a tar":
        with tarfile.open(path, "w") as archive:
            for part in ("storages", "tensors", "pickle"):
                archive.addfile(tarfile.TarInfo(part), io.BytesIO())
    refused(path, words)


def old_form(table: bytes, keys: bytes = b"].", rest: bytes = b"") -> bytes:
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    return head + pickle.dumps({"little_endian": True}, 2) + table + keys + rest


def test_hostile_pickles_are_refused_in_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for name, (body, words) in HOSTILE.items():
        if "DCP" in words:
            continue
        for data in (
            archive_of({"a/data.pkl": b"\x80\x02" + body}),
            old_form(b"\x80\x02" + body),
        ):
            path.write_bytes(data)
            expected = {"names ?": "contains ?", "something outside": "no storage"}
            refused(path, expected.get(words, words)), name


def test_the_old_form_must_have_the_bytes_of_its_storages(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, _use_new_zipfile_serialization=False)
    sound = buffer.getvalue()
    for data, words in (
        (sound[:-1], "is cut off"),
        (sound.replace((6).to_bytes(8, "little"), (7).to_bytes(8, "little")), "another length"),
        (sound.replace(b"FloatStorage", b"DoubleStorage"[:12]), "contains torch.DoubleStorag"),
        (old_form(b"\x80\x02}.", b"N."), "not those of its tensors"),
        (old_form(b"\x80\x02}.", b"]K\1a."), "not those of its tensors"),
        (old_form(b"\x80\x02K\1Q."), "no storage"),
        (pickle.dumps(5, 2), "cannot be read"),
    ):
        path.write_bytes(data)
        refused(path, words)


def test_tensors_that_share_their_bytes_are_bounded(tmp_path: Path) -> None:
    """A thousand tensors of a few bytes would be a thousand layers in memory."""
    path = tmp_path / "w.pth"
    whole = torch.ones(1000)
    torch.save({f"w{number}": whole for number in range(1000)}, path)
    refused(path, "its tensors have 4,000,000 bytes, and share 4,000 of the file")
    torch.save({"tied": whole, "again": whole}, path)
    assert len(read_weights(path).tensors) == 2


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    save_file(official_vit(), model)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is a named pipe"):
        read_weights(model)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json: .*nested deeper|config\.json.*JSON"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is no JSON object"):
        read_weights(model)


STATED: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 10**400}, "cannot be used|heads"),
    ({"num_attention_heads": [4]}, "cannot be used"),
    ({"num_attention_heads": -4}, "-4 heads do not divide"),
    ({"model_type": ["vit"]}, "cannot be used"),
    ({"model_type": "vit", "layer_norm_eps": [1]}, "layer_norm_eps"),
    ({"architecture": "vit_tiny_patch2", "model_args": 5}, "cannot be used"),
    ({"architecture": "vit_tiny_patch2", "model_args": [[1]]}, "cannot be used"),
    ({"pretrained_cfg": 5}, "cannot be used"),
    ({"num_attention_heads": 4, "pretrained_cfg": {"mean": 5, "std": 5}}, "cannot be used"),
    ({"num_attention_heads": 4, "pretrained_cfg": {"mean": [0.5] * 4}}, "cannot be used"),
    ({"num_attention_heads": 4, "pretrained_cfg": {"mean": ["x"] * 3}}, "cannot be used"),
    (
        {"num_attention_heads": 4, "pretrained_cfg": {"mean": [10**400] * 3, "std": [1] * 3}},
        "cannot be used",
    ),
    (
        {"num_attention_heads": 4, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0, 1, 1]}},
        "deviation is positive",
    ),
]


def test_a_config_beside_the_weights_that_states_nonsense_is_refused() -> None:
    tensors = official_vit()
    for config, words in STATED:
        raw = RawWeights(path=Path("w"), tensors=tensors, config=config)
        with pytest.raises(CheckpointError, match=words):
            find_encoder(raw)


HEADERS: list[tuple[dict[str, str], str]] = [
    ({"mean": "[NaN, 0.5, 0.5]"}, "cannot be read"),
    ({"mean": "[1e999, 0.5, 0.5]"}, "cannot be read"),
    ({"mean": "0.5"}, "cannot be read"),
    ({"mean": "{}"}, "cannot be read"),
    ({"mean": '["a", "b", "c"]'}, "cannot be read"),
    ({"mean": "[" * 100_000}, "cannot be read"),
    ({"mean": "[true, true, true]"}, "cannot be read"),
    ({"std": "[0, 1, 1]"}, "deviation is positive"),
    ({"std": "[-1, 1, 1]"}, "deviation is positive"),
    ({"std": "[1e999, 1, 1]"}, "cannot be read"),
    ({"resize": "1000000000"}, "at most 16384 pixels"),
    ({"resize": "-3"}, "cannot be read"),
    ({"image_size": "9" * 5000}, "cannot be read"),
    ({"image_size": "0"}, "cannot be read"),
    ({"heads": "4.0"}, "cannot be read"),
    ({"timm_arguments": "5"}, "no object of JSON"),
    ({"timm_arguments": "[" * 100_000}, "cannot be read"),
    ({"timm_arguments": '{"depth": 99}'}, "contradicts itself"),
    ({"mlp_ratio": "-1", "timm_arguments": "{}"}, "mlp_ratio=-1.0"),
    ({"mlp_ratio": "many"}, "cannot be read"),
    ({"pooling": "\x1b[2J"}, "cannot be read"),
    ({"width": "-64", "timm_arguments": "{}"}, "width|embed_dim|size|has shape"),
    ({"depth": "-1", "timm_arguments": "{}"}, "only in the file|depth"),
    ({"patch_size": "0", "timm_arguments": "{}"}, "patch_size|zero|size"),
]


def test_a_forged_header_of_an_encoder_is_refused(tmp_path: Path) -> None:
    found = describe(find_encoder(RawWeights(path=Path("w"), tensors=official_vit()), heads=4))
    sound = {**found.to_metadata(), "architecture": "custom"}
    path = tmp_path / "w.safetensors"
    for changes, words in HEADERS:
        save_file(official_vit(), path, metadata={**sound, **changes})
        with pytest.raises(CheckpointError, match=words) as error:
            load_encoder(path)
        assert str(path) in str(error.value), changes


def reheaded(path: Path, name: str, dtype: str) -> None:
    """The same bytes under another dtype."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_weights_of_another_kind_of_number_are_refused(tmp_path: Path, dtype: str) -> None:
    found = describe(find_encoder(RawWeights(path=Path("w"), tensors=official_vit()), heads=4))
    path = tmp_path / "w.safetensors"
    save_file(official_vit(), path, metadata=found.to_metadata())
    reheaded(path, "norm.weight", dtype)
    with pytest.raises(
        CheckpointError, match=r"norm\.weight is torch\.u?int32, and of the encoder"
    ):
        load_encoder(path)
    with pytest.raises(CheckpointError, match=r"norm\.weight is of type u?int32"):
        load_foreign(path, heads=4)
    nan = official_vit() | {"norm.weight": torch.full((64,), torch.nan)}
    save_file(nan, path, metadata=found.to_metadata())
    with pytest.raises(CheckpointError, match=r"norm\.weight is not finite"):
        load_encoder(path)


def test_no_file_takes_memory_that_it_does_not_have(tmp_path: Path) -> None:
    """All that ask for gigabytes, in one process that may take half of one more than it has."""
    for number, (data, _) in enumerate(FILES.values()):
        (tmp_path / f"{number}.pth").write_bytes(data)
    for number, (body, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"h{number}.pth").write_bytes(archive_of({"a/data.pkl": b"\x80\x02" + body}))
        (tmp_path / f"h{number}.metadata").write_bytes(b"\x80\x04" + body)
    header = b'{"w": {"dtype": "F32", "shape": [1152921504606846976], "data_offsets": [0, 0]}}'
    for number, size in enumerate((len(header), 99 << 20, 1 << 62)):
        (tmp_path / f"s{number}.safetensors").write_bytes(size.to_bytes(8, "little") + header)
    code = """
import resource, sys
from pathlib import Path
import torch
from fastmoco.checkpoint import CheckpointError
from fastmoco.checkpoint.dcp_metadata import read_metadata
from fastmoco.models.weights.reading import read_weights
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (512 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_metadata(path, {}) if path.suffix == ".metadata" else read_weights(path)
    except (CheckpointError, ValueError) as error:
        assert "MemoryError" not in str(error), (path, error)
    else:
        raise SystemExit(f"{path} was taken")
print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout.strip() == "refused", done.stderr[-2000:]
