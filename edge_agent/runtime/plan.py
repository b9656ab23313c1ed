"""Which provider runs which network here: the one asked for, or what measured fastest.

Measurements are kept in a file in the user's cache folder, by the network's digest, the provider's
version, the device and the number of threads: a change of any of them asks for a new measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_agent.bundle import Component
from edge_agent.precision import HALF, W8A8, suits
from edge_agent.runtime import providers
from edge_agent.runtime.checked import LEAST_PSNR_DB
from edge_agent.types import Provider

# Another engine has to be loaded as well, so that it must save something.
WORTH_S = 0.02
NOT_MEASURED = "not measured here yet"
# Who runs files of a precision before anything is measured: onnxruntime's CPU widens 16-bit floats
# again in every run, and takes longer in 8 bits throughout than in 32.
_MADE_FOR = {
    HALF: (Provider.CUDA, Provider.DIRECTML, Provider.COREML, Provider.OPENVINO),
    W8A8: (Provider.OPENVINO,),
}
# What decides, or is compared with what was kept, is computed in 32 bits whatever draws.
_EXACT = {
    Provider.OPENVINO: Provider.OPENVINO_F32,
    Provider.TENSORRT: Provider.CUDA,
    Provider.COREML: Provider.CPU,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """How one provider ran one network: median seconds of a run, and how near it came to the CPU.

    `seconds` is None where nobody took the time, `error` is why it did not run, `psnr_db` the peak
    signal-to-noise ratio of the worst output.
    """

    seconds: float | None = None
    psnr_db: float | None = None
    error: str | None = None

    @property
    def right(self) -> bool:
        """Whether its answer is the network's."""
        return self.psnr_db is not None and self.psnr_db >= LEAST_PSNR_DB


@dataclass(frozen=True, slots=True)
class Choice:
    """The provider of one network, and why it is this one."""

    provider: Provider
    reason: str


def cache_folder() -> Path:
    """Return where what can be computed again is kept: the user's cache folder."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("routet2i-edge"))


def digest_of(part: Component) -> str:
    """Return one digest for all files of a network."""
    seals = sorted(f"{name} {record.sha256}" for name, record in part.files.items())
    return hashlib.sha256("\n".join(seals).encode()).hexdigest()


def exact(provider: Provider) -> Provider:
    """Return the provider that stands in for `provider` where 32 bits are wanted."""
    return _EXACT.get(provider, provider)


def candidates(precise: bool) -> list[Provider]:
    """Return the providers that are worth measuring here, the CPU first."""
    here = providers.available()
    return [one for one in here if not precise or exact(one) is one]


def _unmeasured(part: Component, precise: bool) -> Choice:
    made_for, here = _MADE_FOR.get(part.precision, ()), providers.available()
    for provider in made_for:
        if provider in here:
            return Choice(exact(provider) if precise else provider, NOT_MEASURED)
    if not made_for:
        return Choice(Provider.CPU, NOT_MEASURED)
    wanted = " or ".join(made_for)
    return Choice(Provider.CPU, f"{part.precision} is made for {wanted}: not here")


class Plan:
    """Chooses a provider for each network; `wanted` is what the owner asked for."""

    def __init__(self, wanted: Provider, threads: int, folder: Path | None = None) -> None:
        self.wanted, self.threads = wanted, threads
        self._file = (folder or cache_folder()) / "measured.json"

    def choose(self, part: Component, *, precise: bool = False) -> Choice:
        """Return the provider that runs this network; `precise` asks for 32 bits."""
        if self.wanted is not Provider.AUTO:
            chosen = exact(self.wanted) if precise else self.wanted
            if chosen is self.wanted:
                return Choice(chosen, "asked for")
            return Choice(chosen, f"asked for {self.wanted}; this network needs 32 bits")
        known = self.measured(part, candidates(precise)) if self._file.exists() else {}
        seconds = {
            one: found.seconds
            for one, found in known.items()
            if found.right and found.seconds is not None
        }
        if Provider.CPU not in seconds:
            return _unmeasured(part, precise)
        seconds[Provider.CPU] -= WORTH_S
        if not suits(part, Provider.CPU):
            del seconds[Provider.CPU]
            if not seconds:
                return _unmeasured(part, precise)
        fastest = min(seconds, key=lambda one: seconds[one])
        return Choice(fastest, f"best of {len(known)} measured here")

    def measured(self, part: Component, among: Sequence[Provider]) -> dict[Provider, Measured]:
        """Return what was measured of this network on this device, by provider."""
        content = self._read()
        found = {}
        for provider in among:
            entry = content.get(self._key(part, provider))
            if isinstance(entry, dict):
                with contextlib.suppress(TypeError):  # of another version: as if never measured
                    found[provider] = Measured(**entry)
        return found

    def remember(self, part: Component, results: Mapping[Provider, Measured]) -> None:
        """Keep measurements of one network, beside those of others."""
        content = self._read()
        for provider, result in results.items():
            content[self._key(part, provider)] = asdict(result)
        # What cannot be kept is measured again when asked for.
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
            partial.replace(self._file)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _key(self, part: Component, provider: Provider) -> str:
        about = [part.name, digest_of(part)[:16], provider, providers.engine_of(provider)]
        return " | ".join([*about, providers.device_of(provider), f"{self.threads} threads"])
