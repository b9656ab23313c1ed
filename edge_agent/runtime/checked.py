"""Whether an engine computes what the network says: its answer beside the CPU's, once.

Engines do answer wrongly without an error: OpenVINO reads FusedGemm's sigmoid as a ReLU, CoreML has
given wrong 16-bit values (onnxruntime #32569). A spoilt picture is seen; a spoilt decision is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from edge_agent.errors import GenerationError
from edge_agent.runtime.network import Backend, Engine
from edge_agent.types import Cancellation

LEAST_PSNR_DB = 30.0  # bfloat16 keeps 45 to 50 dB on the networks of the starter models
_MOST_PSNR_DB = 200.0  # of equal arrays


def psnr_db(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Return the worst output's peak signal-to-noise ratio; the peak is its largest magnitude."""
    worst = _MOST_PSNR_DB
    for want, got in zip(wanted, found, strict=True):
        if want.shape != got.shape or not np.isfinite(got).all():
            return -_MOST_PSNR_DB
        error = float(np.mean((want.astype(np.float64) - got) ** 2))
        peak = max(float(np.abs(want).max(initial=0.0)), 1e-12)
        worst = min(worst, 10 * math.log10(peak**2 / error) if error else _MOST_PSNR_DB)
    return worst


class Checked:
    """An engine that must answer its first run as the CPU does; then `passed` is told how near.

    `on_cpu` opens the same network on the CPU for that one run.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        on_cpu: Callable[[], Engine],
        passed: Callable[[float], None],
    ) -> None:
        self._name, self._engine = name, engine
        self._on_cpu, self._passed = on_cpu, passed
        self._trusted = False

    @property
    def inputs(self) -> Collection[str]:
        """The names of the inputs."""
        return self._engine.inputs

    @property
    def backend(self) -> Backend:
        """What runs it."""
        return self._engine.backend

    def run(
        self, feeds: Mapping[str, np.ndarray], cancellation: Cancellation | None = None
    ) -> list[np.ndarray]:
        """Run the network; raises GenerationError when its first answer is not the CPU's."""
        outputs = self._engine.run(feeds, cancellation)
        if not self._trusted:
            near = psnr_db(self._on_cpu().run(feeds, cancellation), outputs)
            if near < LEAST_PSNR_DB:
                raise GenerationError(
                    f"{self._engine.backend.provider} computes {self._name} wrongly here "
                    f"({near:.0f} dB from the CPU, {LEAST_PSNR_DB:.0f} are needed); choose "
                    "--provider auto or cpu, or run `python -m export` to write the bundle again"
                )
            self._passed(near)
            self._trusted = True
        return outputs
