"""Shards on a server: which URLs a pattern names, what is asked for, what is never shown, and the
loader over all of it."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fastmoco_pipelines.errors import RemoteError, ShardError
from fastmoco_pipelines.making.pack import pack_folder
from fastmoco_pipelines.sets.patterns import is_remote
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores import object_store
from fastmoco_pipelines.stores.store import Request
from fastmoco_pipelines.text import redact
from tests.pipelines.http_fault_server import FaultServer, drop, redirect, stall, status
from tests.pipelines.stores.test_http_faults import HASTY, QUICK

remote = pytest.importorskip("fastmoco_pipelines.stores.http", reason="urllib3 is not installed")
SECRET = "Geheim123"


@pytest.fixture
def spec(tmp_path):
    return CacheSpec(cache_dir=str(tmp_path / "cache"))


def require_equal(shards: ShardSet, local: ShardSet) -> None:
    ids = np.arange(len(local))
    assert (shards.digest, shards.classes, shards.keys) == (local.digest, local.classes, local.keys)
    assert [shards.describe(i) for i in ids] == [local.describe(i) for i in ids]
    assert shards.paths_of(ids) == local.paths_of(ids)
    assert all(np.array_equal(a, b) for a, b in zip(shards.read(ids), local.read(ids), strict=True))


@pytest.mark.parametrize(
    "pattern",
    ["", "train-{000000..000002}.tar", "train-*.tar", "*", "{train-000000,train-00000[12]}.tar"],
)
def test_a_remote_set_is_the_local_one(pattern, server, packed, spec):
    with (
        ShardSet.open(f"{server.url}/{pattern}", cache=spec, limits=QUICK) as shards,
        ShardSet.open(str(packed)) as local,
    ):
        require_equal(shards, local)
    subset = ShardSet.open(f"{server.url}/train-000001.tar", cache=spec, limits=QUICK)
    assert subset.keys == ShardSet.open(f"{packed}/train-000001.tar").keys


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("http:///x.tar", "not a complete URL"),
        ("http:x.tar", "not a complete URL"),
        ("http://host:port/x.tar", "not a complete URL"),
        ("http://ho st/x.tar", "not a complete URL"),
        ("http://host/x\r\nHost: other/x.tar", "not a complete URL"),
        ("http://host/{5..1}.tar", "not a rising range"),
        ("http://host/*/x.tar", "only a file's name"),
        ("ftp://host/x.tar", "not supported yet: give a path"),
        ("pipe:curl http://host/x.tar", "never starts a command"),
        ("PIPE:curl", "never starts a command"),
        ("hdfs://host/x.tar", "not supported yet"),
        ("gopher:x", "not supported yet"),
        ("{http://host/x.tar,/local/x.tar}", "local files and URLs"),
        ("{http://host/x.tar,pipe:x}", "never starts a command"),
        ("{http://host/x,s3://key:secret@bucket/x}.tar", "credentials of a store"),
    ],
)
def test_other_patterns_are_refused(pattern, words, spec):
    with pytest.raises(ValueError, match=words):
        ShardSet.open(pattern, cache=spec, limits=QUICK)


def test_folders_without_a_choice_are_refused(server, packed, image_folder, tmp_path, spec):
    both = Path(shutil.copytree(packed, tmp_path / "both"))
    pack_folder(image_folder, both, prefix="test")
    with FaultServer(both) as two:
        with pytest.raises(
            ValueError,
            match=r"several sets: name one, http://.*/test-\*\.tar or http://.*/train-\*\.tar",
        ):
            ShardSet.open(f"{two.url}/", cache=spec, limits=QUICK)
        assert len(ShardSet.open(f"{two.url}/test-*.tar", cache=spec, limits=QUICK)) == 45
    server.always["manifest.json"] = status(404)
    with pytest.raises(ValueError, match=r"no manifest\.json that lists the shards"):
        ShardSet.open(f"{server.url}/", cache=spec, limits=QUICK)
    with ShardSet.open(
        f"{server.url}/train-{{000000..000002}}.tar", cache=spec, limits=QUICK
    ) as shards:
        assert (shards.classes, len(shards.read(np.arange(45)))) == (
            (),
            45,
        )  # checked by crc32 alone


def test_an_index_is_fetched_once_and_then_asked_about(server, packed, spec):
    for _ in range(2):
        ShardSet.open(f"{server.url}/", cache=spec, limits=QUICK).close()
    assert len(list(Path(spec.cache_dir).glob("*.doc"))) == 4
    for path in Path(spec.cache_dir).glob("*.doc"):
        raw = path.read_bytes()
        path.write_bytes(
            raw[:-9] + b"X" + raw[-8:]
        )  # the server goes on to say that it is the same
    with (
        ShardSet.open(f"{server.url}/", cache=spec, limits=QUICK) as shards,
        ShardSet.open(str(packed)) as local,
    ):
        require_equal(shards, local)


@pytest.mark.filterwarnings("always")
def test_secrets_are_sent_and_never_shown(server, tmp_path, spec, caplog, capfd, recwarn):
    caplog.set_level(logging.DEBUG)
    host = server.url.partition("://")[2]
    pattern = f"http://user:{SECRET}@{host}/train-{{000000..000002}}.tar?sig={SECRET}&x=1#{SECRET}"
    with ShardSet.open(pattern, cache=spec, limits=QUICK) as shards:
        shards.read(np.arange(45))
        assert SECRET not in shards.digest + shards.describe(0)
    said = []
    for fault in (
        status(404),
        status(403),
        status(500),
        stall(10),
        redirect(f"file:///x?{SECRET}"),
        redirect(f"?{SECRET}"),
        drop(9),
    ):
        server.always["train-000001.tar"] = server.always["train-000001.tar.index"] = fault
        fresh = CacheSpec(cache_dir=f"{spec.cache_dir}{len(said)}")
        with (
            pytest.raises(RuntimeError) as raised,
            ShardSet.open(pattern, cache=fresh, limits=HASTY) as shards,
        ):
            shards.read(np.arange(45))
        error: BaseException | None = raised.value
        while error is not None:
            said.append(repr(error))
            error = None if error.__suppress_context__ else error.__context__
    for other in (
        f"ftp://u:{SECRET}@h/x.tar",
        f"http://u:{SECRET}@h:port/x",
        f"http://u:p{SECRET}?@h/x",
        f"s3://{SECRET}@b/*.tar?x",
    ):
        with pytest.raises((ValueError, ShardError)) as raised:
            ShardSet.open(other, cache=spec, limits=QUICK)
        said.append(repr(raised.value))
    said += (
        [record.getMessage() for record in caplog.records]
        + [str(w.message) for w in recwarn]
        + list(capfd.readouterr())
    )
    assert not [text for text in said if SECRET in text]
    assert len(said) > 10
    for path in Path(spec.cache_dir).iterdir():
        assert SECRET not in path.name
        assert SECRET.encode() not in path.read_bytes()


def test_urls_are_shown_without_their_secrets():
    assert redact("https://u:p@host:8443/a/b.tar?token=x#y") == "https://host:8443/a/b.tar"
    assert redact("https://u:p?q@host/a.tar") == "https://..."
    assert redact("https:/u:p@host/a.tar") == "https:..."  # a slip
    assert redact("s3:u:p@host/a.tar") == "s3:..."
    assert redact("http://host/a@b.tar") == "http://host/a@b.tar"
    assert redact("/data/a?b#c.tar") == "/data/a?b#c.tar"
    assert redact("{http://u:p@h/a,http://v:q@i/b}.tar") == "{http://h/a,http://i/b}.tar"
    assert (
        redact("{http://u:p@h:1,https://v:q@i:2,http://w:r@j}/b.tar?x")
        == "{http://h:1,https://i:2,http://j}/b.tar"
    )
    assert redact("http://[::1]:80/x\x1b[2J") == r"http://[::1]:80/x\x1b[2J"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (redirect("http://[secret/x"), "redirects to what is not a usable URL: refused"),
        (redirect("http://host:99999999/x"), "is not a usable URL"),
        (redirect("file:///etc/passwd"), "redirects to 'file'"),
        (status(503, Retry_After="\u00b2\u00b2"), "HTTP 503"),
        (status(206, Content_Range=f"bytes 5-9/{'9' * 5000}"), "another range than asked for"),
        (status(206, Content_Range=f"bytes {'5' * 5000}-9/10"), "another range than asked for"),
        (status(206), "another range than asked for"),
        (status(200, Content_Encoding="gzip"), "compresses it on the way"),
        (status(200, Long="x" * 200_000), "was lost"),
    ],
)
def test_heads_of_a_hostile_answer_are_named(fault, words, server):
    server.always["train-000000.tar"] = fault
    deadline = time.monotonic() + 60
    request = Request(
        url=f"{server.url}/train-000000.tar", start=5, limits=QUICK, deadline=deadline
    )
    with pytest.raises(RemoteError, match=words) as raised:  # noqa: SIM117
        with remote.STORE.open(request):
            raise AssertionError
    assert "secret" not in str(raised.value)


def test_user_and_password_go_to_their_host_alone(server, packed, monkeypatch, spec):
    seen: dict[str, str | None] = {}
    handler = server.RequestHandlerClass
    original = handler.do_GET
    monkeypatch.setattr(
        handler,
        "do_GET",
        lambda self: (
            seen.setdefault(self.headers["Host"] + self.path[:12], self.headers["Authorization"]),
            original(self),
        ),
    )
    with FaultServer(packed) as other:
        server.always["train-000000.tar.index"] = redirect(f"{other.url}/train-000000.tar.index")
        url = server.url.replace("://", "://user:pass@")
        ShardSet.open(f"{url}/train-000000.tar", cache=spec, limits=QUICK).close()
        host, elsewhere = server.url.partition("://")[2], other.url.partition("://")[2]
    assert seen[f"{host}/train-00000"] == "Basic dXNlcjpwYXNz"
    assert seen[f"{elsewhere}/train-00000"] is None


def test_a_public_server_cannot_send_us_to_a_private_one(server, monkeypatch, spec):
    assert [
        remote._peer_is_public(fake_connection(a))
        for a in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "8.8.8.8", "::ffff:10.0.0.1")
    ] == [False] * 4 + [True, False]
    answers = iter([True, False])
    monkeypatch.setattr(remote, "_peer_is_public", lambda connection: next(answers))
    server.always["train-000000.tar.index"] = redirect("/train-000001.tar.index")
    with pytest.raises(RemoteError, match=r"from a public to a private address .*: refused"):
        ShardSet.open(f"{server.url}/train-000000.tar", cache=spec, limits=QUICK)
    assert server.count("train-000001.tar.index") == 0


def fake_connection(address: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(sock=types.SimpleNamespace(getpeername=lambda: (address, 80)))


def test_redirects_inside_http_are_followed(server, packed, spec):
    with FaultServer(packed) as front:
        for path in packed.iterdir():
            front.always[path.name] = redirect(f"{server.url}/{path.name}")
        with (
            ShardSet.open(f"{front.url}/", cache=spec, limits=QUICK) as shards,
            ShardSet.open(str(packed)) as local,
        ):
            require_equal(shards, local)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_stores_name_the_package_they_need(scheme, package, spec, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    object_store.file_system.cache_clear()
    assert is_remote(f"{scheme}://bucket/x.tar")
    for name in ("train-{000000..000002}.tar", "train-*.tar", ""):
        with pytest.raises(
            RemoteError,
            match=rf"{scheme}://: needs the package {package} .*: pip install '\.\[{scheme}\]' in",
        ):
            ShardSet.open(f"{scheme}://bucket/{name}", cache=spec, limits=QUICK)


def test_the_extras_that_are_named_bring_these_packages():
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert [name.partition(">=")[0] for scheme in ("s3", "gs") for name in extras[scheme]] == [
        "s3fs",
        "gcsfs",
    ]


def test_a_store_serves_as_http_does(packed, spec, monkeypatch):
    """fsspec's file system in memory in a store's place; s3fs and gcsfs answer through the same
    four methods."""
    memory = fsspec.filesystem("memory")
    for path in packed.iterdir():
        memory.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    monkeypatch.setattr(object_store, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(object_store, "file_system", lambda scheme: memory)
    with ShardSet.open(str(packed)) as local:
        for name in ("", "train-*.tar", "train-{000000..000002}.tar"):
            with ShardSet.open(f"s3://bucket/set/{name}", cache=spec, limits=QUICK) as shards:
                require_equal(shards, local)
        failing = iter([OSError("x"), TimeoutError(), None, ValueError(SECRET)] + [None] * 1000)
        original = memory.cat_file

        def cat_file(*args: object, **options: object) -> bytes:
            if (error := next(failing)) is not None:
                raise error
            return original(*args, **options)

        monkeypatch.setattr(memory, "cat_file", cat_file)
        shutil.rmtree(spec.cache_dir)
        with ShardSet.open("gs://bucket/set/train-*.tar", cache=spec, limits=QUICK) as shards:
            require_equal(shards, local)
        with pytest.raises(
            ShardError, match=r"s3://bucket/set/none-000000\.tar\.index: does not exist"
        ):
            ShardSet.open("s3://bucket/set/none-000000.tar", cache=spec, limits=QUICK)
    monkeypatch.setattr(memory, "info", lambda path: time.sleep(5))
    with pytest.raises(RemoteError, match=r"s3://.*no answer in 0\.6 s; given up"):
        ShardSet.open("s3://bucket/set/train-000000.tar", cache=spec, limits=HASTY)


def test_fsspec_is_not_needed_for_http(server, spec):
    code = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from fastmoco_pipelines.sets.shard_set import ShardSet\nfrom fastmoco_pipelines.spec import CacheSpec\n"
        f"shards = ShardSet.open({server.url + '/'!r}, cache=CacheSpec(cache_dir={spec.cache_dir!r}))\n"
        "assert len(shards.read([0, 20, 40])) == 3 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
