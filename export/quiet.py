"""Keep the chatter of exporters away from the user, who should see a bar and a table."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

KNOWN_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # Networks that branch on sizes need torch's older exporter, as optimum does.
    (DeprecationWarning, "You are using the legacy TorchScript-based ONNX export"),
    (DeprecationWarning, "The feature will be removed. Please remove usage of this function"),
    (DeprecationWarning, r"`torch\.jit\.script` is deprecated"),
    # Inside torch.export.
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    # Several LoRAs, which is what was asked for.
    (UserWarning, "Already found a `peft_config` attribute in the model"),
    # Two inputs share their batch: as they should.
    (UserWarning, "# The axis name: .* will not be used, since it shares the same shape"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporters are known to say on good models; errors still come through."""
    from torch.jit import TracerWarning  # type: ignore[attr-defined]  # public by its docs

    before = logging.root.manager.disable
    # Not logger by logger: diffusers and transformers set their levels again when imported.
    logging.disable(max(before, logging.ERROR))  # what is wrong is raised as well
    try:
        with warnings.catch_warnings():
            # Python branches on shapes are fixed while tracing; the parity check covers that.
            warnings.simplefilter("ignore", TracerWarning)
            for category, message in KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        logging.disable(before)
