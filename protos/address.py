"""How both ends of the wire write an address: `HOST:PORT`, with an IPv6 host in brackets."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can be meant."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str, *, lowest_port: int = 1) -> Address:
    """Read `HOST:PORT`; raise ValueError with a sentence that names `text`."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (colon and (_is_ipv6(host[1:-1]) if bracketed else _HOST.fullmatch(host))):
        raise ValueError(f"address {text!r} is not HOST:PORT, such as 127.0.0.1:50051")
    if not (port.isascii() and port.isdigit() and lowest_port <= int(port[:6]) <= 65535):
        raise ValueError(f"address {text!r} has no port from {lowest_port} to 65535 at its end")
    return Address(host[1:-1] if bracketed else host, int(port))


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
