"""The section `security` of the configuration: who may listen in, and who may call.

Only contradictions are found here. Whether files exist and fit together is found where they are read, on the machine
that uses them (`branchline.wire.tls`, `gateway.keys`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from branchline.config_base import require


@dataclass(frozen=True)
class OutsideTls:
    """TLS of the gateways' two ports. All are PEM files; without a certificate the ports are not encrypted."""

    #: The gateway's certificate, intermediate ones behind it.
    certificate: str = ""
    key: str = ""
    #: Clients must show a certificate that one of these authorities has signed. Empty: they need none.
    client_ca: str = ""

    def __post_init__(self) -> None:
        require(bool(self.certificate) or not self.key, "certificate: missing, though there is a key")
        require(bool(self.key) or not self.certificate, "key: missing, though there is a certificate")
        require(bool(self.certificate) or not self.client_ca, "certificate: missing, though there is a client_ca")

    @property
    def on(self) -> bool:
        return bool(self.certificate)


@dataclass(frozen=True)
class InsideTls:
    """Mutual TLS between gateways, prefill and decode workers. PEM files: all three, or none for plain text."""

    #: This process's certificate, shown as a server and as a client.
    certificate: str = ""
    key: str = ""
    #: The authority that has signed everybody's. Whoever has a certificate of it is trusted: use it for this alone.
    ca: str = ""
    #: The name that the workers' certificates carry. Empty: each carries the host of the address it is reached at.
    server_name: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("certificate", "key", "ca") if getattr(self, name)]
        for name in ("certificate", "key", "ca"):
            require(not given or name in given, f"{name}: missing, though there is a {' and a '.join(given)}")
        require(bool(given) or not self.server_name, "certificate: missing, though there is a server_name")

    @property
    def on(self) -> bool:
        return bool(self.certificate)


@dataclass(frozen=True)
class SecurityConfig:
    """docs/security.md says how to make the files."""

    outside: OutsideTls = field(default_factory=OutsideTls)
    inside: InsideTls = field(default_factory=InsideTls)
    #: The API keys that clients need, a YAML file written with `branchline keys new`. Empty: nobody needs one.
    api_keys: str = ""
