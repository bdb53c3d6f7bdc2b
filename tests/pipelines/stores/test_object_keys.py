"""Keys of S3 as people choose them, on moto's server: every character is itself, and patterns work
beside it. And what the store refuses, by what it means."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores import object_store
from fastmoco_pipelines.text import redact, shard_name
from tests.pipelines.stores.test_http import require_equal
from tests.pipelines.stores.test_http_faults import QUICK

SLOW = dataclasses.replace(QUICK, respond_seconds=20, deadline_seconds=20, attempts=1)
FOLDERS = {
    "a space": "my set",
    "brackets": "My Set [v1]",
    "an encoded space, literally": "my%20set",
    "marks of a URL": "a?b=c&d#e+f=100%;@:$",
    "braces and commas": "{a,b} (c)",
    "letters": "größe 写真 e\u0301",
    "a question mark": "what?",
    "folders": "a b/c d/[e]",
}


@pytest.fixture(scope="module")
def store(packed):
    """A client of a server with one set in folders of all these names."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "Geheim")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "Geheim")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        forget()
        client = boto3.client("s3")
        client.create_bucket(Bucket="bkt")
        for folder in FOLDERS.values():
            for path in packed.iterdir():
                client.put_object(Bucket="bkt", Key=f"{folder}/{path.name}", Body=path.read_bytes())
        yield client
        forget()
    server.stop()


def forget() -> None:
    """The next file system is a new one, with the environment of that moment."""
    import s3fs

    object_store.file_system.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def spec(tmp_path):
    return CacheSpec(cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["", "train-*.tar", "train-{000000..000002}.tar"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_any_name_is_read(folder, name, store, packed, spec):
    pattern = f"s3://bkt/{FOLDERS[folder]}/{name}"
    with (
        ShardSet.open(pattern, cache=spec, limits=QUICK) as shards,
        ShardSet.open(str(packed)) as local,
    ):
        require_equal(shards, local)
    assert redact(pattern) == pattern


@pytest.mark.parametrize(
    "name", ["my 1.tar", "x[1].tar", "a,b {c,d}.tar", "50%20.tar", "q?.tar#1.tar"]
)
def test_an_object_of_any_name_is_read(name, store, packed, spec):
    for suffix in ("", ".index"):
        body = (packed / f"train-000001.tar{suffix}").read_bytes()
        store.put_object(Bucket="bkt", Key=f"objects/{name}{suffix}", Body=body)
    with ShardSet.open(f"s3://bkt/objects/{name}", cache=spec, limits=QUICK) as shards:
        assert len(shards.read(np.arange(len(shards)))) == 16
    assert shard_name(f"s3://bkt/objects/{name}") == name


@pytest.mark.parametrize(
    ("pattern", "samples"),
    [
        ("my set/train-00000[01].tar", 32),
        ("my set/train-{000000,000002}.tar", 29),
        ("{my set,what?}/train-000000.tar", 32),
        ("my?set/train-000000.tar", 16),
        ("my*/train-00000?.tar", 90),  # my set and my%20set
        ("My Set [[]v1]/train-*.tar", 45),
    ],
)
def test_patterns_still_are_patterns(pattern, samples, store, spec):
    with ShardSet.open(f"s3://bkt/{pattern}", cache=spec, limits=QUICK) as found:
        assert len(found) == samples


def test_a_store_without_credentials_names_the_cure(store, spec, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget()
    try:
        with pytest.raises(RuntimeError, match=r"s3://bkt/my set/.*FSSPEC_S3_ANON=true"):
            ShardSet.open("s3://bkt/my set/", cache=spec, limits=SLOW)
    finally:
        forget()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("EndpointConnectionError", "check AWS_ENDPOINT_URL"),
        ("SSLError", "AWS_CA_BUNDLE"),
        ("ProxyConnectionError", "proxy of HTTPS_PROXY"),
    ],
)
def test_a_store_that_cannot_be_reached_names_what_to_check(name, words):
    kind = getattr(pytest.importorskip("botocore.exceptions"), name)

    def call() -> None:
        raise kind(endpoint_url="Geheim", proxy_url="Geheim", error="Geheim")

    with pytest.raises(RuntimeError, match=words) as raised:
        object_store.bounded("s3://b/k", 5, call)
    assert "Geheim" not in str(raised.value)


class _Refused(Exception):
    def __init__(self, code: str) -> None:
        super().__init__("Geheim")
        self.response = {"Error": {"Code": code}}


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("RequestTimeTooSkewed", PermissionError, "clock of this machine"),
        ("AuthorizationHeaderMalformed", OSError, "another region.*AWS_DEFAULT_REGION"),
        ("301", OSError, "another region"),
        ("AccessDenied", PermissionError, "FSSPEC_S3_REQUESTER_PAYS"),
        ("ExpiredToken", PermissionError, "log in again"),
        ("NoSuchBucket", FileNotFoundError, "no such bucket"),
        ("SlowDown", OSError, "the store fails"),
    ],
)
def test_what_the_codes_of_a_store_mean(code, kind, words):
    def call() -> None:
        raise kind("Geheim") from _Refused(code)

    with pytest.raises(RuntimeError, match=rf"s3://b/k: .*{words}") as raised:
        object_store.bounded("s3://b/k", 5, call)
    assert "Geheim" not in str(raised.value)
