"""Training through what is between a user and a set: a proxy with a password, a bearer token, an
authority of one's own, an object key with a space. Real commands, and the losses of local
shards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.making.pack import pack_folder
from tests.fault_runs import environment
from tests.pipelines.gate_servers import GateServer, make_certificates

pytestmark = [pytest.mark.faults, pytest.mark.long, pytest.mark.slow]

SECRET = "Geheim123"
BASIC = "Basic dXNlcjpHZWhlaW0xMjM="  # user:Geheim123
IGNORED = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUESTS_CA_BUNDLE")
IGNORED += ("CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_CA_BUNDLE", "AWS_PROFILE")


def train(shards: str, out: Path, **variables: str) -> list[float]:
    """The losses of two epochs with 16 images a step."""
    command = [sys.executable, "-m", "fastmoco", "train", "vit_nano8_e60_b256"]
    command += ["--data.shards", shards, "--data.cache-dir", str(out.with_suffix(".cache"))]
    command += ["--global-batch-size", "16", "--epochs", "2", "--device", "cpu", "--threads", "1"]
    command += ["--knn.every-epochs", "0", "--log-every-steps", "1", "--out", str(out)]
    known = environment(**variables)
    known = {
        name: value
        for name, value in known.items()
        if name in variables or name.lower() not in {item.lower() for item in IGNORED}
    }
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    texts = [done.stdout, done.stderr]
    texts += [path.read_text(errors="replace") for path in out.glob("*.json*")]
    assert not [text for text in texts if SECRET in text]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 tiny images in three shards."""
    images, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("packed")
    for number in range(64):
        levels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(levels).save(images / f"{number}.jpg")
    pack_folder(images, out, shard_samples=24)
    return out


@pytest.fixture(scope="module")
def expected(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    losses = train(f"{packed}/train-*.tar", tmp_path_factory.mktemp("local") / "run")
    assert len(losses) > 3
    return losses


@contextmanager
def through_a_proxy(packed: Path, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    wants = {"Proxy-Authorization": BASIC}
    with GateServer(packed, wants=wants, refusal=407) as proxy:
        yield (
            "http://data.example/train-{000000..000002}.tar",
            {"http_proxy": f"http://user:{SECRET}@127.0.0.1:{proxy.port}"},
        )


@contextmanager
def with_a_token(packed: Path, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with GateServer(packed, wants={"Authorization": f"Bearer {SECRET}"}) as server:
        header = f"localhost:{server.port}=Authorization: Bearer {SECRET}"
        yield f"{server.url}/train-*.tar", {"FASTMOCO_HTTP_HEADERS": header}


@contextmanager
def with_an_authority(packed: Path, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    certificates = make_certificates(folder)
    with GateServer(packed, tls=certificates.context("localhost")) as server:
        yield f"{server.url}/", {"REQUESTS_CA_BUNDLE": str(certificates.authority)}


@contextmanager
def from_a_key_with_a_space(packed: Path, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            client = boto3.client("s3")
            client.create_bucket(Bucket="bkt")
            for path in packed.iterdir():
                client.put_object(Bucket="bkt", Key=f"my set/{path.name}", Body=path.read_bytes())
        yield "s3://bkt/my set/train-{000000..000002}.tar", variables
    finally:
        server.stop()


KINDS = [through_a_proxy, with_a_token, with_an_authority, from_a_key_with_a_space]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_through_a_server_is_the_local_run(kind, packed, expected, tmp_path) -> None:
    with kind(packed, tmp_path) as (shards, variables):
        assert train(shards, tmp_path / "run", **variables) == expected
