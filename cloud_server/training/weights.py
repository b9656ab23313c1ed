"""Weights written for everybody who may read the folder, and loaded only when all are there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cloud_server.errors import ModelError


def save_weights(
    weights: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the rights that any new file has here.

    The library's own are the owner's alone: a server under another account could not load them.
    """
    save_file(dict(weights), file, metadata=metadata)
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def load_whole(
    kind: Any, source: str | Path, *, spared: Sequence[str] = (), **settings: Any
) -> Any:
    """Load a model of diffusers or transformers, all of whose weights are there and fit.

    The libraries fill in at random, or with nothing at all, what is missing, which is found out
    much later. Weights one part of whose dotted names begins as `spared` may be missing. Raises
    ModelError.
    """
    model, found = kind.from_pretrained(
        source,
        ignore_mismatched_sizes=True,  # they are told below, by name
        output_loading_info=True,
        **settings,
    )
    # Diffusers gives their shapes too, transformers does not.
    unfit = sorted(each if isinstance(each, str) else each[0] for each in found["mismatched_keys"])
    if unfit:
        shape = tuple(model.state_dict()[unfit[0]].shape)
        raise misfit(source, f"{unfit[0]} expected shape {shape}")
    missing = sorted(key for key in found["missing_keys"] if not is_spared(key, spared))
    if missing:
        raise ModelError(
            f"weights are missing in '{source}', {len(missing)} of them, the first {missing[0]}; "
            "fetch or train it again"
        )
    return model


def is_spared(name: str, spared: Sequence[str]) -> bool:
    """Return whether a part of a weight's dotted name begins as one of `spared`."""
    return any(f".{each}" in f".{name}" for each in spared)


def misfit(source: str | Path, why: str) -> ModelError:
    """Return the error for weights of other shapes than their configuration says."""
    return ModelError(
        f"the weights in '{source}' do not fit its config.json ({why}); fetch or train it again"
    )
