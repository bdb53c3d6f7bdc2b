"""Which certificates are trusted, and what a refused one means.

`REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE` (each a file, or a folder of hashed names), `SSL_CERT_FILE`
and `SSL_CERT_DIR`: the authorities of every one that is set are trusted, and the system's where
none is.
`FASTMOCO_CLIENT_CERT` names a file with a certificate and key of one's own.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping

from fastmoco_pipelines.errors import RemoteError
from fastmoco_pipelines.files.small import UnfitFileError, open_regular

BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
CLIENT = "FASTMOCO_CLIENT_CERT"
_EXPIRED, _NOT_YET, _WRONG_HOST, _WRONG_ADDRESS = 10, 9, 62, 64  # X509_V_ERR_...


def settings(environment: Mapping[str, str] | None = None) -> tuple[tuple[str, str], ...]:
    """(variable, value) of all that decide, as a key under which a context may be kept."""
    variables = os.environ if environment is None else environment
    return tuple((name, variables[name]) for name in (*BUNDLES, CLIENT) if variables.get(name))


def tls_context(chosen: tuple[tuple[str, str], ...]) -> ssl.SSLContext:
    """A context that checks certificates and host names.

    Args:
        chosen: from `settings`.

    Raises:
        RemoteError: naming the variable whose file is missing or holds no certificate.
    """
    given = dict(chosen)
    bundles = [(name, given[name]) for name in BUNDLES if name in given]
    if not bundles:
        context = ssl.create_default_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without the system's authorities
        for name, path in bundles:
            _trust(context, name, path)
    if CLIENT in given:
        _load_own(context, given[CLIENT])
    return context


def _trust(context: ssl.SSLContext, name: str, path: str) -> None:
    """Add the authorities that a variable names; SSL_CERT_DIR may list several folders."""
    try:
        for place in path.split(os.pathsep) if name == "SSL_CERT_DIR" else [path]:
            if os.path.isdir(place):
                context.load_verify_locations(capath=place)
            else:
                os.close(open_regular(place))  # OpenSSL would wait for a pipe
                context.load_verify_locations(cafile=place)
    except FileNotFoundError:
        raise RemoteError(f"{name}={path}: there is no such file: correct it or unset it") from None
    except (OSError, UnfitFileError):  # SSLError is an OSError
        raise RemoteError(
            f"{name}={path}: cannot be read as certificates in PEM form: correct it or unset it"
        ) from None


def _load_own(context: ssl.SSLContext, path: str) -> None:
    """Certificate and key of this client; a key with a passphrase is refused instead of asked
    for."""
    try:
        os.close(open_regular(path))
        context.load_cert_chain(path, password=lambda: "")
    except (OSError, UnfitFileError) as error:
        reason = error.strerror if isinstance(error, FileNotFoundError) else "not usable"
        raise RemoteError(
            f"{CLIENT}={path}: must name a PEM file with a certificate and its key, without a "
            f"passphrase ({reason})"
        ) from None


def explain(error: ssl.SSLCertVerificationError) -> str:
    """What is wrong with a server's certificate, and the cure."""
    reason = error.verify_message
    if error.verify_code == _EXPIRED:
        return f"its certificate is not valid ({reason}): renew it, or check this machine's clock"
    if error.verify_code == _NOT_YET:
        return f"its certificate is not valid ({reason}): check this machine's clock"
    if error.verify_code in (_WRONG_HOST, _WRONG_ADDRESS):
        return f"its certificate is for another host ({reason}): check the host's name in the URL"
    in_use = [name for name, _ in settings() if name != CLIENT]
    trusted = f"those of {' and '.join(in_use)}" if in_use else "the system's authorities"
    return (
        f"its certificate is not valid ({reason}; trusted are {trusted}): give the certificates of "
        "its authority as a PEM file in SSL_CERT_FILE or REQUESTS_CA_BUNDLE"
    )
