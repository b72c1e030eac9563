"""How a client connects: in plain text or with TLS, and with a key or without."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc

from branchline.client.errors import InvalidRequestError

#: A PEM file's path, or its content.
Pem = str | os.PathLike[str] | bytes

_LONGEST_KEY = 256


@dataclass(frozen=True)
class Tls:
    """An encrypted connection. Each part is a PEM file's path, or its content as bytes.

    `Tls()` trusts the public authorities that gRPC knows; `Tls(ca="ca.pem")` those of the file instead. For mutual TLS,
    `certificate` and `key` are shown to the gateway.
    """

    ca: Pem | None = None
    certificate: Pem | None = None
    key: Pem | None = field(default=None, repr=False)
    #: The name that the gateway's certificate carries, where it is not the host that the client connects to.
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            missing = "key" if self.key is None else "certificate"
            raise InvalidRequestError(f"tls.{missing}: certificate and key go together")

    def credentials(self) -> grpc.ChannelCredentials:
        """gRPC's, of the files as they are now. Raises InvalidRequestError for one that can't be read."""
        parts = ((name, getattr(self, name)) for name in ("ca", "key", "certificate"))
        return grpc.ssl_channel_credentials(*(_pem(f"tls.{name}", part) for name, part in parts))

    @property
    def options(self) -> list[tuple[str, str]]:
        # gRPC calls it an override; the certificate is verified all the same, for that name.
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


class Keyed:
    """A channel whose calls carry an API key. It has what the generated stubs use of a channel."""

    def __init__(self, channel: Any, api_key: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {api_key}"),)

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return self._keyed(self._channel.unary_unary(*arguments, **options))

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return self._keyed(self._channel.unary_stream(*arguments, **options))

    def _keyed(self, method: Any) -> Any:
        def call(request: Any, *, metadata: Iterable[tuple[str, str]] | None = None, **options: Any) -> Any:
            return method(request, metadata=(*self._metadata, *(metadata or ())), **options)

        return call


def check_key(api_key: str | None) -> str | None:
    """Raises InvalidRequestError for what no header can carry. The message does not repeat it."""
    if api_key is None:
        return None
    if not isinstance(api_key, str) or not 0 < len(api_key) <= _LONGEST_KEY:
        raise InvalidRequestError(f"api_key: must be a string of 1 to {_LONGEST_KEY} characters")
    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise InvalidRequestError("api_key: must be ASCII without spaces or line breaks")
    return api_key


def _pem(name: str, part: Pem | None) -> bytes | None:
    if part is None or isinstance(part, bytes):
        return part
    try:
        with open(part, "rb") as file:
            return file.read()
    except OSError as error:
        raise InvalidRequestError(f"{name}: {os.fspath(part)}: {error.strerror}") from None
