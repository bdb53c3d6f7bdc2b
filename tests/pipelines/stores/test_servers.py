"""Servers as they are met: proxies with passwords, tokens, authorities of one's own, answers that
are no files, connections that are kept."""

from __future__ import annotations

import http.server
import logging
import socket
import ssl
import threading
import time
from email.utils import formatdate
from urllib.parse import unquote

import numpy as np
import pytest

from fastmoco_pipelines.errors import RemoteError
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.credentials import credentials_for
from fastmoco_pipelines.stores.proxies import proxy_of
from tests.pipelines.gate_servers import GateServer, make_certificates
from tests.pipelines.http_fault_server import FaultServer, redirect, status
from tests.pipelines.stores.test_http_faults import QUICK

pytest.importorskip("urllib3", reason="urllib3 is not installed")

BASIC = "Basic dXNlcjpwQHNzL3c="  # user:p@ss/w
LOGIN = "user:p%40ss%2Fw"
SECRETS = ("p%40ss", "p@ss", "dXNlcjp", "Geheim")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """No proxy, token or authority of this machine."""
    names = [name for proxy in PROXY_VARIABLES for name in (proxy, proxy.upper())]
    names += ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "NETRC"]
    names += ["HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "XDG_CACHE_HOME"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def spec(tmp_path):
    return CacheSpec(cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("authority"))


def read(url: str, spec: CacheSpec) -> int:
    """Read every sample of a set."""
    with ShardSet.open(url, cache=spec, limits=QUICK) as shards:
        return len(shards.read(np.arange(len(shards))))


def refusal(url: str, spec: CacheSpec) -> str:
    """The error of a set that cannot be opened; it holds no secret."""
    with pytest.raises(RuntimeError) as raised:
        read(url, spec)
    text = str(raised.value)
    assert not [secret for secret in SECRETS if secret in text]
    return text


# ---------------------------------------------------------------- proxies


@pytest.mark.parametrize(
    ("scheme", "variables", "found"),
    [
        ("http", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("http", {"HTTP_PROXY": "p"}, "http://p:80"),
        ("http", {"HTTP_PROXY": "p", "REQUEST_METHOD": "GET"}, None),
        ("http", {"http_proxy": "", "HTTP_PROXY": "http://p:1"}, None),
        ("https", {"HTTPS_PROXY": "https://p"}, "https://p:443"),
        ("https", {"http_proxy": "http://p:1"}, None),
        ("https", {"ALL_PROXY": "socks5://p"}, "socks5://p:1080"),
        ("http", {"all_proxy": "http://[::1]:9", "ALL_PROXY": "http://q"}, "http://[::1]:9"),
    ],
)
def test_the_variable_of_a_proxy(scheme, variables, found):
    proxy = proxy_of(scheme, "data.example", 80, variables)
    assert (proxy and proxy.address) == found


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("*", "data.example", True),
        ("other, data.example", "data.example", True),
        (".example", "data.example", True),
        ("*.example", "data.example", True),
        ("example", "a.data.example", True),
        ("ample", "data.example", False),
        ("DATA.example.", "data.EXAMPLE", True),
        ("data.example:8080", "data.example", True),
        ("data.example:80", "data.example", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("127.0.0.1:8080", "127.0.0.1", True),
        ("::1", "::1", True),
        ("[::1]:8080", "::1", True),
        ("[::1]:80", "::1", False),
        ("fe80::/10", "fe80::5", True),
        ("", "data.example", False),
    ],
)
def test_hosts_that_are_reached_directly(no_proxy, host, direct):
    variables = {"http_proxy": "http://p:1", "NO_PROXY": no_proxy}
    assert (proxy_of("http", host, 8080, variables) is None) == direct


@pytest.mark.parametrize(
    "value", ["http://user:Geheim@:1", "ftp://p", "http://p:Geheim", "http://a b"]
)
def test_a_variable_that_names_no_proxy_is_not_quoted(value):
    with pytest.raises(RemoteError, match=r"http_proxy: its value is not the URL") as raised:
        proxy_of("http", "h", 80, {"http_proxy": value})
    assert "Geheim" not in str(raised.value)


@pytest.mark.parametrize("login", [LOGIN, "user:p@ss/w"])
@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_a_proxy_gets_user_and_password(variable, login, packed, spec, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    wants = {"Proxy-Authorization": BASIC}
    with GateServer(packed, wants=wants, refusal=407) as proxy:
        monkeypatch.setenv(variable, f"http://{login}@127.0.0.1:{proxy.port}")
        assert read("http://data.example/train-000000.tar", spec) == 16
        assert {headers["Host"] for _, headers in proxy.seen} == {"data.example"}
        monkeypatch.setenv(variable, f"http://user:Geheim@127.0.0.1:{proxy.port}")
        text = refusal("http://data.example/train-000001.tar", spec)
        assert f"the proxy 127.0.0.1:{proxy.port} of {variable} refuses user and password" in text
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        text = refusal("http://data.example/train-000001.tar", spec)
        assert f"of {variable} asks for user and password (HTTP 407)" in text
        proxy.offers = "Negotiate"
        text = refusal("http://data.example/train-000001.tar", spec)
        assert "asks for a login by Negotiate" in text
    monkeypatch.setenv("no_proxy", "data.example")
    assert f"of {variable}" not in refusal("http://data.example:1/train-000001.tar", spec)
    assert not [text for text in SECRETS if text in caplog.text]
    assert "urllib3" not in {record.name.partition(".")[0] for record in caplog.records}


def test_https_goes_through_a_tunnel(packed, spec, certificates, monkeypatch):
    """The proxy sees neither headers nor files, and the server no password of the proxy."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    monkeypatch.setenv("FASTMOCO_HTTP_HEADERS", "data.example=Authorization: Bearer x")
    wants = {"Authorization": "Bearer x"}
    with (
        GateServer(packed, tls=certificates.context("data.example"), wants=wants) as server,
        GateServer(
            packed,
            wants={"Proxy-Authorization": BASIC},
            refusal=407,
            tunnel=server.server_address,
        ) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://{LOGIN}@127.0.0.1:{proxy.port}")
        assert read("https://data.example/train-000000.tar", spec) == 16
        assert {target for target, _ in proxy.seen} == {"data.example:443"}
        assert not [h for _, headers in proxy.seen for h in headers if h == "Authorization"]
        assert not [h for _, headers in server.seen for h in headers if h.startswith("Proxy")]
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        text = refusal("https://data.example/train-000001.tar", spec)
        assert "of HTTPS_PROXY asks for user and password (HTTP 407)" in text
        proxy.wants, proxy.tunnel = {}, None
        assert "refuses to connect to it (HTTP 502)" in refusal(
            "https://data.example/train-000001.tar", spec
        )


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_is_named(scheme, packed, spec, monkeypatch):
    with FaultServer(packed) as server:
        gone = server.url.partition("://")[2]
    monkeypatch.setenv("all_proxy", f"http://user:Geheim@{gone}")
    text = refusal(f"{scheme}://data.example/train-000000.tar", spec)
    assert f"the proxy {gone} of all_proxy cannot be reached (Connection refused)" in text
    monkeypatch.setenv("all_proxy", f"socks5://user:Geheim@{gone}")
    text = refusal(f"{scheme}://data.example/train-000000.tar", spec)
    assert "needs the package PySocks" in text or "cannot be reached (Connection refused)" in text


# ---------------------------------------------------------------- credentials

NETRC = "machine localhost login user password p@ss/w\nmachine other login a password b\n"


@pytest.mark.parametrize(
    ("variable", "value", "wanted"),
    [
        ("FASTMOCO_HTTP_HEADERS", "localhost=Authorization: Bearer Geheim", "Bearer Geheim"),
        (
            "FASTMOCO_HTTP_HEADERS",
            "other=X: y | http://LOCALHOST = authorization: token Geheim 2",
            "token Geheim 2",
        ),
        ("NETRC", NETRC, BASIC),
        ("", "", BASIC),  # in the URL
    ],
)
def test_a_gated_set_is_read(variable, value, wanted, packed, spec, monkeypatch, tmp_path, caplog):
    with GateServer(packed, wants={"Authorization": wanted}) as server:
        url = f"{server.url}/train-000000.tar"
        text = refusal(url, spec)
        assert "access is refused (HTTP 401): no credentials were sent" in text
        assert "FASTMOCO_HTTP_HEADERS" in text
        assert "HF_TOKEN" in text
        assert "~/.netrc" in text
        if variable == "NETRC":
            (tmp_path / ".netrc").write_text(value)
        elif variable:
            monkeypatch.setenv(variable, value)
        else:
            url = url.replace("://", f"://{LOGIN}@")
        assert read(url, spec) == 16
        server.wants = {"Authorization": "another"}
        source = variable.replace("NETRC", ".netrc") or "the URL"
        assert f"{source}, and what they allow" in refusal(url.replace("00.tar", "01.tar"), spec)
    assert not [text for text in SECRETS if text in caplog.text]
    for path in (tmp_path / "cache").iterdir():
        assert not [text for text in SECRETS if text.encode() in path.read_bytes()]


def test_credentials_stay_with_their_host(packed, spec, monkeypatch, tmp_path):
    """A redirect to another host, or another port of it, gets none; one inside the host does."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password Geheim\n")
    monkeypatch.setenv("FASTMOCO_HTTP_HEADERS", "localhost=X-Token: Geheim")
    with GateServer(packed) as front, GateServer(packed) as behind:
        for name in ("train-000000.tar", "train-000000.tar.index"):
            front.always[name] = redirect(f"http://127.0.0.1:{behind.port}/{name}?sig=1")
            front.always[f"in/{name}"] = redirect(f"{behind.url}/{name}")
        assert read(f"{front.url}/train-000000.tar", spec) == 16
        assert {headers.get("X-Token") for _, headers in front.seen} == {"Geheim"}
        names = {name.lower() for _, headers in behind.seen for name in headers}
        assert behind.seen
        assert not {"x-token", "authorization"} & names


@pytest.mark.parametrize(
    ("url", "asked", "sent"),
    [
        ("https://huggingface.co/x", "https://huggingface.co/x", {"HF_TOKEN"}),
        ("https://hf.co/x", "https://hf.co/x", {"HF_TOKEN"}),
        ("http://huggingface.co/x", "http://huggingface.co/x", set()),  # in clear text
        ("https://huggingface.co/x", "http://huggingface.co/x", {"HF_TOKEN"}),
        ("https://cdn-lfs.huggingface.co/x", "https://huggingface.co/x", set()),
        ("https://huggingface.co.evil.example/x", "https://huggingface.co.evil.example/x", set()),
        ("http://mirror:8080/x", "http://mirror:8080/x", {"HF_TOKEN"}),
        ("http://mirror:8081/x", "http://mirror:8081/x", set()),
        ("https://safe/x", "https://safe/x", {"FASTMOCO_HTTP_HEADERS"}),
        ("http://safe/x", "http://safe/x", set()),  # the entry is for https
        ("https://safe:444/x", "https://safe:444/x", {"FASTMOCO_HTTP_HEADERS"}),
        ("http://[::1]:80/x", "http://[::1]:80/x", {"FASTMOCO_HTTP_HEADERS"}),
        ("http://[::1]:81/x", "http://[::1]:81/x", set()),
    ],
)
def test_which_host_gets_what(url, asked, sent):
    variables = {
        "HOME": "/nonexistent",
        "HF_TOKEN": "hf_x",
        "HF_ENDPOINT": "http://mirror:8080",
        "FASTMOCO_HTTP_HEADERS": "https://safe=X: y\n[::1]:80=X: y",
    }
    assert set(credentials_for(url, asked, variables).sources) == sent


def test_the_file_of_a_token_of_hugging_face(tmp_path):
    place = tmp_path / ".cache" / "huggingface" / "token"
    place.parent.mkdir(parents=True)
    place.write_text("hf_y\n")
    found = credentials_for("https://hf.co/x", "https://hf.co/x", {"HOME": str(tmp_path)})
    assert found.headers == {"Authorization": "Bearer hf_y"}
    assert "hf_y" not in repr(found)


@pytest.mark.parametrize("value", ["Geheim", "h=Geheim", "h=X: y | Geheim", "h=Range: Geheim"])
def test_a_variable_of_headers_that_cannot_be_read_is_not_quoted(value):
    variables = {"FASTMOCO_HTTP_HEADERS": value}
    with pytest.raises(RemoteError, match=r"FASTMOCO_HTTP_HEADERS: entry \d") as raised:
        credentials_for("http://h/x", "http://h/x", variables)
    assert "Geheim" not in str(raised.value)


# ---------------------------------------------------------------- TLS


@pytest.mark.parametrize(
    "variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR"]
)
def test_an_authority_of_ones_own(variable, certificates, packed, spec, monkeypatch, tmp_path):
    with GateServer(packed, tls=certificates.context("localhost")) as server:
        url = f"{server.url}/train-000000.tar"
        text = refusal(url, spec)
        assert "certificate is not valid (unable to get local issuer certificate" in text
        assert "SSL_CERT_FILE or REQUESTS_CA_BUNDLE" in text
        place = certificates.authority
        if variable == "SSL_CERT_DIR":
            certificates._run("rehash", ".")
            place = certificates.folder
        monkeypatch.setenv(variable, str(place))
        # A second variable adds its authorities, as on machines that set all of them.
        if variable != "REQUESTS_CA_BUNDLE":
            other = certificates.signed("another.example")
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(other))
        assert read(url, spec) == 16
        monkeypatch.setenv(variable, str(tmp_path / "absent.pem"))
        assert f"{variable}={tmp_path / 'absent.pem'}: there is no such file" in refusal(url, spec)
        (tmp_path / "text.pem").write_text("nothing")
        monkeypatch.setenv(variable, str(tmp_path / "text.pem"))
        assert f"{variable}={tmp_path / 'text.pem'}: cannot be read as certificates" in refusal(
            url, spec
        )


@pytest.mark.parametrize(
    ("host", "ends", "words"),
    [
        (
            "localhost",
            "20210101000000Z",
            "certificate has expired): renew it, or check this machine",
        ),
        ("other.example", "21000101000000Z", "is for another host"),
    ],
)
def test_what_is_wrong_with_a_certificate(
    host, ends, words, certificates, packed, spec, monkeypatch
):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    with GateServer(packed, tls=certificates.context(host, ends=ends)) as server:
        assert words in refusal(f"{server.url}/train-000000.tar", spec)


def test_a_certificate_of_ones_own_is_shown(certificates, packed, spec, monkeypatch):
    context = certificates.context("localhost")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates.authority)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    with GateServer(packed, tls=context) as server:
        url = f"{server.url}/train-000000.tar"
        assert "train-000000.tar.index: " in refusal(url, spec)
        monkeypatch.setenv("FASTMOCO_CLIENT_CERT", str(certificates.signed("a client")))
        assert read(url, spec) == 16
        monkeypatch.setenv("FASTMOCO_CLIENT_CERT", str(certificates.authority))
        assert "with a certificate and its key" in refusal(url, spec)


def test_redirects_between_http_and_https(certificates, packed, spec, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    context = certificates.context("localhost")
    with GateServer(packed) as plain, GateServer(packed, tls=context) as secure:
        for name in ("train-000000.tar", "train-000000.tar.index"):
            plain.always[name] = redirect(f"{secure.url}/{name}")
        secure.always["train-000001.tar.index"] = redirect(f"{plain.url}/train-000001.tar.index")
        assert read(f"{plain.url}/train-000000.tar", spec) == 16
        text = refusal(f"{secure.url}/train-000001.tar", spec)
        assert "redirects from https to http: refused" in text


def test_https_to_a_port_without_tls_is_named(packed, spec):
    with GateServer(packed) as server:
        url = f"https://localhost:{server.port}/train-000000.tar"
        assert "no TLS connection can be made (WRONG_VERSION_NUMBER)" in refusal(url, spec)


# ---------------------------------------------------------------- answers and connections


def test_a_page_in_place_of_an_index_is_called_one(server, spec):
    def page(handler, data):
        body = b"\n<!DOCTYPE html><html><body>Log in</body></html>"
        handler.head(200, {"Content-Length": len(body), "Content-Type": "text/html"})
        handler.push(body)

    server.always["train-000000.tar.index"] = page
    text = refusal(f"{server.url}/train-000000.tar", spec)
    assert "is a web page, and is not an index" in text
    assert "FASTMOCO_HTTP_HEADERS" in text
    server.always["train-000000.tar.index"] = status(511)
    assert "this network asks for a login" in refusal(f"{server.url}/train-000000.tar", spec)


def test_a_date_in_retry_after_is_waited_for(server, spec):
    began = time.time()
    when = formatdate(began + 1.5, usegmt=True)
    server.script["train-000000.tar.index"] = [status(429, Retry_After=when)]
    assert read(f"{server.url}/train-000000.tar", spec) == 16
    assert time.time() >= began + 0.5  # a date has whole seconds


class _KeepingHandler(http.server.SimpleHTTPRequestHandler):
    """Keeps connections, but closes each when it gets its second request: as a server whose time
    for idle connections is over at this moment."""

    protocol_version = "HTTP/1.1"
    connections: list[str]
    answered = 0

    def setup(self) -> None:
        super().setup()
        self.connections.append("new")

    def do_GET(self) -> None:
        self.answered += 1
        self.connections.append(self.path)
        if self.answered == self.server.most:  # type: ignore[attr-defined]
            self.close_connection = True
            return
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("most", [0, 2])
def test_connections_are_kept_and_those_that_were_closed_replaced(most, packed, spec, caplog):
    class Handler(_KeepingHandler):
        connections: list[str] = []  # noqa: RUF012

        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(packed))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.most = most
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert read(f"http://127.0.0.1:{server.server_port}/train-000000.tar", spec) == 16
        server.shutdown()
    opened = Handler.connections.count("new")
    requests = len(Handler.connections) - opened
    assert not caplog.records, "a closed connection is no failure"
    assert opened == 1 if most == 0 else 1 < opened < requests


@pytest.mark.parametrize(
    "path",
    ["my set/a b.tar", "möwe/größe 100%.tar", "a&b=c;d+e/x,y[1].tar", "%5B%20%5D/z.tar"],
)
def test_urls_with_other_characters_are_read(path, packed, spec, tmp_path):
    """Spaces and letters beyond ASCII may be written as they are; `%20` is a space."""
    place = tmp_path / "site" / unquote(path)
    place.parent.mkdir(parents=True)
    for suffix in ("", ".index"):
        place.with_name(place.name + suffix).write_bytes(
            (packed / f"train-000000.tar{suffix}").read_bytes()
        )
    with FaultServer(tmp_path / "site") as server:
        assert read(f"{server.url}/{path}", spec) == 16
        assert read(f"{server.url}/{path}?sig=a%20b#c", spec) == 16


def test_a_server_at_an_ipv6_address(packed, spec):
    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6
        daemon_threads = True

    class Handler(_KeepingHandler):
        connections: list[str] = []  # noqa: RUF012

        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(packed))

    try:
        server = Server(("::1", 0), Handler)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        server.most = 0
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert read(f"http://[::1]:{server.server_address[1]}/train-000000.tar", spec) == 16
        server.shutdown()


def test_a_redirect_to_a_name_beyond_ascii(packed, spec, tmp_path):
    for name in ("train-000000.tar", "train-000000.tar.index"):
        (tmp_path / f"ü {name}").write_bytes((packed / name).read_bytes())
        (tmp_path / name).touch()
    with FaultServer(tmp_path) as server:

        def moved(handler, data):
            there = f"/ü{handler.path.replace('/', ' ')}"
            handler.send_response_only(302)
            handler._headers_buffer.append(f"Location: {there}\r\n".encode())
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        server.always = dict.fromkeys(("train-000000.tar", "train-000000.tar.index"), moved)
        assert read(f"{server.url}/train-000000.tar", spec) == 16
