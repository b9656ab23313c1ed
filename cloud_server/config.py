"""Settings of the server: a flag, else `CLOUD_SERVER_*`, else config.toml, else the default."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from cloud_server.errors import ConfigError
from protos.address import Address, parse_address

APP = "routet2i-cloud-server"


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What `cloud-server serve` runs with."""

    model: str
    address: Address
    insecure: bool = False
    reflection: bool = False
    grace_s: float = 30.0
    queue_limit: int = 8
    threads: int | None = None
    device: str = "auto"


def listen_address(text: str, *, insecure: bool) -> Address:
    """Read HOST:PORT, port 0 any free one; raise ConfigError unless loopback or `insecure`."""
    try:
        address = parse_address(text, lowest_port=0)
    except ValueError as error:
        raise ConfigError(f"{error}; give --address a host and a port") from error
    if not (address.loopback or insecure):
        raise ConfigError(
            f"address {text} can be reached from other machines and nothing here checks who calls;"
            " listen on 127.0.0.1 or accept that with --insecure"
        )
    return address


def config_path() -> Path:
    """Return where the owner's settings are looked for; the device has a file of its own."""
    return Path(platformdirs.user_config_dir(APP)) / "config.toml"


def read_config(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Read the settings in config.toml; empty if there is none.

    Raises ConfigError naming the file and the key for TOML that is wrong or keys not in `known`.
    """
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; correct or remove it") from error
    known = sorted(known)
    for key in read:
        if key not in known:
            raise ConfigError(f"{path} sets unknown {key!r}; choose of {', '.join(known)}")
    return read
