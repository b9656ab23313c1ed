"""The weights of a network in its usual formats: which files hold them, and a model made of them.

A repository often has them several times over: as safetensors and as pickles, in full and in half
precision, whole and as training left them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cloud_server.errors import ModelError
from export.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor  # slow to import, and not needed to look at names

FP16 = "fp16"
# Settings and vocabularies.
SETTINGS = re.compile(r"[^.]+\.(json|txt)")
# Weights as both libraries load them; an index says which of several files holds which weight.
FILE = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.fp16|-\d{5}-of-\d{5})*"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(\.fp16)?\.json)?"
)


def best(names: Iterable[str]) -> list[str]:
    """Return those of a folder's files that its weights are taken from, none where it has none.

    Full precision goes before half, then safetensors before pickles.
    """
    found = [match for name in names if (match := FILE.fullmatch(name))]
    held = [_rank(match) for match in found if not match["index"]]  # an index alone holds nothing
    return [match[0] for match in found if _rank(match) == min(held)] if held else []


def _rank(match: re.Match[str]) -> tuple[bool, bool]:
    return f".{FP16}" in match[0], match["format"] == "bin"


def wanted(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Return those of a repository's files that the folders `parts` need, "" being its own."""
    folders: dict[str, list[str]] = {part: [] for part in parts}
    for name in map(PurePosixPath, names):
        folders.get("" if len(name.parts) == 1 else str(name.parent), []).append(name.name)
    return [
        str(PurePosixPath(folder, name))
        for folder, files in folders.items()
        for name in [*filter(SETTINGS.fullmatch, files), *best(files)]
    ]


def check_present(folder: Path, usual: str) -> None:
    """Raise ExportError where a folder has no weights; `usual` is the file that has them mostly."""
    if not best(_names(folder)):
        raise ExportError(
            f"there are no weights in '{folder}', where {usual} should be; fetch or train the "
            "model again"
        )


def variant_of(folder: Path) -> str | None:
    """Return which variant of a folder's weights the libraries are to load, None being the full."""
    return FP16 if any(f".{FP16}" in name for name in best(_names(folder))) else None


def load_sound(kind: Any, folder: Path, *, spared: Sequence[str] = (), **settings: Any) -> Any:
    """Load a model of diffusers or transformers, all of whose weights are there, fit and are sound.

    Weights that are `spared`, as `load_whole` says, may be anything. Raises ExportError.
    """
    from cloud_server.training.weights import is_spared, load_whole, misfit

    try:
        model = load_whole(kind, folder, spared=spared, variant=variant_of(folder), **settings)
    except ModelError as err:
        raise ExportError(str(err)) from err
    except ValueError as err:  # with advice for who calls the library
        raise ExportError(str(misfit(folder, str(err).partition(". ")[0]))) from err
    weights = model.state_dict().items()
    check_finite({key: each for key, each in weights if not is_spared(key, spared)}, folder)
    return model


def check_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ExportError where weights of `source` are no numbers, naming the first."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ExportError(
                f"the weights in '{source}' are damaged: {name} holds NaN or infinity; fetch or "
                "train it again"
            )


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]
