"""How the commands that talk to a gateway get past its door: flags for TLS and the API key. Imports the SDK only."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from branchline.client import Client, InvalidRequestError, Tls

#: A key on the command line would be seen in lists of processes, so it comes by a file or by this.
KEY_VARIABLE = "BRANCHLINE_API_KEY"

_PUBLIC = "public"


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access to the gateway")
    group.add_argument(
        "--api-key-file", metavar="FILE", help=f"a file with the key (default: ${KEY_VARIABLE}, or none)"
    )
    add_tls_flags(group)


def add_tls_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tls-ca",
        metavar="FILE",
        help=f"connect with TLS and trust these authorities; '{_PUBLIC}' for the well-known ones",
    )
    add("--tls-certificate", metavar="FILE", help="with --tls-ca: the client's own certificate")
    add("--tls-key", metavar="FILE", help="and its key")
    add("--tls-server-name", metavar="NAME", help="the name in the server's certificate, if it is not the host")


def connect(target: str, arguments: argparse.Namespace, environ: Mapping[str, str]) -> Client:
    """A client as the flags say. Raises InvalidRequestError."""
    return Client(target, api_key=_api_key(arguments.api_key_file, environ), tls=tls_of(arguments))


def _api_key(path: str | None, environ: Mapping[str, str]) -> str | None:
    if path is None:
        return environ.get(KEY_VARIABLE) or None
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError as error:
        raise InvalidRequestError(f"--api-key-file: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidRequestError(f"--api-key-file: {path}: not UTF-8") from None


def tls_of(arguments: argparse.Namespace) -> Tls | None:
    """Raises InvalidRequestError."""
    more: dict[str, Any] = {
        name: value for name in ("certificate", "key", "server_name") if (value := getattr(arguments, f"tls_{name}"))
    }
    if arguments.tls_ca is None:
        if more:
            raise InvalidRequestError(f"--tls-{next(iter(more)).replace('_', '-')}: only with --tls-ca")
        return None
    return Tls(ca=None if arguments.tls_ca == _PUBLIC else arguments.tls_ca, **more)
