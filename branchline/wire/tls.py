"""TLS for servers and channels, out of PEM files.

Servers take up renewed files without a restart: every handshake looks whether they have changed. A channel reads them
when it is opened, and shows that certificate as long as it lives.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from branchline.config_base import ConfigError
from branchline.config_security import InsideTls, OutsideTls

logger = logging.getLogger(__name__)

T = TypeVar("T")
Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ServerFiles:
    """What a server shows and whom it trusts: paths of PEM files, and the section of the configuration that they are
    from. With a `client_ca` clients must show a certificate.
    """

    section: str
    certificate: str
    key: str
    client_ca: str

    def stamp(self) -> Stamp:
        """Changes when a file does. Raises OSError."""
        return tuple(_stamp(path) for path in (self.certificate, self.key, self.client_ca) if path)

    def context(self) -> ssl.SSLContext:
        """A server's, of the files as they are now. Raises ConfigError, naming the field."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for field in ("certificate", "key", "client_ca"):
            if path := getattr(self, field):
                _read(self.section, field, path)  # ssl's own errors don't say which file is missing
        try:
            # A key that is encrypted must not make OpenSSL ask for a password at the terminal.
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ValueError) as error:
            what = f"{self.section}.key: {self.key} does not fit the certificate {self.certificate}"
            raise ConfigError(f"{what}, is encrypted, or one of them is not PEM ({_reason(error)})") from None
        if self.client_ca:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ValueError) as error:
                message = f"{self.section}.client_ca: {self.client_ca} is not PEM ({_reason(error)})"
                raise ConfigError(message) from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def grpc_configuration(self) -> Any:
        """The same for gRPC. Raises ConfigError, naming the field."""
        self.context()  # gRPC takes whatever it is given, and fails when a client comes
        key, certificate = (_read(self.section, field, getattr(self, field)) for field in ("key", "certificate"))
        authority = _read(self.section, "client_ca", self.client_ca) if self.client_ca else None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)


class Renewal(Generic[T]):
    """What is made of a server's files, and made again when they have changed. Handshakes ask, in any thread."""

    def __init__(self, files: ServerFiles, make: Callable[[], T]) -> None:
        """`make` raises ConfigError for files that can't be used; so does this."""
        self._files = files
        self._make = make
        self._lock = threading.Lock()
        self.first = make()
        self._stamp = files.stamp()

    def look(self) -> T | None:
        """Once for every change what is made of the new files, else None. Files may be replaced one by one: while they
        don't fit together, what was made before stays in use, and the log says so once.
        """
        with self._lock:
            try:
                stamp = self._files.stamp()
                if stamp == self._stamp:
                    return None
                self._stamp = stamp
                made = self._make()
            except (OSError, ConfigError) as error:
                logger.error("%s: renewed files are not taken: %s", self._files.section, error)
                return None
        logger.info("%s: the files have changed, new connections use them", self._files.section)
        return made


def outside_files(tls: OutsideTls) -> ServerFiles | None:
    """None when TLS is off."""
    return ServerFiles("security.outside", tls.certificate, tls.key, tls.client_ca) if tls.on else None


def inside_files(tls: InsideTls) -> ServerFiles | None:
    """None when TLS is off."""
    return ServerFiles("security.inside", tls.certificate, tls.key, tls.ca) if tls.on else None


def server_credentials(files: ServerFiles | None) -> grpc.ServerCredentials | None:
    """What a gRPC server takes; None for plain text. Raises ConfigError for files that can't be used."""
    if files is None:
        return None
    renewal = Renewal(files, files.grpc_configuration)
    require_certificates = bool(files.client_ca)
    return grpc.dynamic_ssl_server_credentials(renewal.first, renewal.look, require_certificates)


def server_context(files: ServerFiles) -> ssl.SSLContext:
    """The same for a server that takes Python's. Raises ConfigError."""
    renewal = Renewal(files, files.context)
    current = renewal.first

    def renew(connection: Any, _name: str | None, _context: ssl.SSLContext) -> None:
        """As each handshake begins, whether or not the client names a server."""
        nonlocal current
        current = renewal.look() or current
        connection.context = current

    renewal.first.sni_callback = renew
    return renewal.first


@dataclass(frozen=True)
class ChannelTls:
    """What a channel to a worker needs."""

    credentials: grpc.ChannelCredentials
    options: tuple[tuple[str, str], ...]


def channel_tls(tls: InsideTls) -> ChannelTls | None:
    """Of the files as they are now; None for plain text. Raises ConfigError."""
    if not tls.on:
        return None
    authority, key, certificate = (
        _read("security.inside", field, getattr(tls, field)) for field in ("ca", "key", "certificate")
    )
    # gRPC calls it an override; the certificate is verified all the same, for that name.
    options = (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()
    return ChannelTls(grpc.ssl_channel_credentials(authority, key, certificate), options)


def _read(section: str, field: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{section}.{field}: {path}: {error.strerror}") from None


def _stamp(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _reason(error: Exception) -> str:
    return getattr(error, "reason", "") or getattr(error, "strerror", "") or str(error)
