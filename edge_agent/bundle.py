"""What a bundle is, the folder of networks that `python -m export` wrote, and how one is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.errors import REBUILD, BundleError
from edge_agent.verified import FileRecord, check_digests, check_size

FORMAT = 2
MANIFEST = "bundle.json"


@dataclass(frozen=True, slots=True)
class Parity:
    """How close the exported part came to torch: `value` in `metric`, export fails below `gate`.

    Both compute in 32-bit floats; what a lower precision adds to that is its `Loss`.
    """

    metric: str
    value: float
    gate: float


@dataclass(frozen=True, slots=True)
class Loss:
    """What lower precision costs, measured at export against the same in 32-bit floats.

    `psnr_db` compares a component's outputs on the samples of its parity, `picture_psnr_db`
    finished pictures of the same noise; `flips` is the share of prompts that the router sends to
    the other side. None where the component has no part in it. `accepted` says that this is more
    than exporting lets pass unasked.
    """

    psnr_db: float | None
    picture_psnr_db: float | None
    flips: float | None
    accepted: bool

    def __str__(self) -> str:
        told = {"outputs": self.psnr_db, "pictures": self.picture_psnr_db}
        parts = [f"{what} {value:.1f} dB" for what, value in told.items() if value is not None]
        parts += [] if self.flips is None else [f"{self.flips:.1%} of decisions"]
        known = ", ".join(parts) or "nothing that is drawn or decided"
        return known + (" (accepted)" if self.accepted else "")


@dataclass(frozen=True, slots=True)
class Component:
    """One ONNX network of the bundle; `files` holds the graph and its external weights.

    `loss` is that of this component alone, None in 32-bit floats.
    """

    name: str
    file: str
    files: Mapping[str, FileRecord]
    opset: int
    precision: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parity: Parity
    source: str
    optimized: bool
    loss: Loss | None = None

    @property
    def size_bytes(self) -> int:
        """Size on disk of all files of this component."""
        return sum(record.size for record in self.files.values())


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A `tokenizers` file and how prompts are padded for its text encoder: not, where None."""

    file: str
    record: FileRecord
    context_length: int
    pad_id: int | None


@dataclass(frozen=True, slots=True)
class PreviewSpec:
    """A small decoder's component, and how it scales the denoiser's latents."""

    decoder: str
    scaling_factor: float
    shift_factor: float


@dataclass(frozen=True, slots=True)
class DiffusionSpec:
    """How the edge model draws: conditioning, sampler configuration, latent space and defaults.

    `denoiser` and `text_encoders` name components; `text_states` are the encoders' states that the
    denoiser reads, `hidden` or `penultimate`; `empty_is_zeros` says that an empty negative prompt
    stands for zeros. Latents are `(B, latent_channels, height / vae_scale, width / vae_scale)`, and
    width and height are multiples of `size_step`. `preview` is None where no decoder is small.
    """

    family: str
    model: str
    digest: str
    denoiser: str
    text_encoders: tuple[str, ...]
    text_states: str
    empty_is_zeros: bool
    scheduler: Mapping[str, Any]
    latent_channels: int
    vae_scale: int
    size_step: int
    scaling_factor: float
    shift_factor: float
    width: int
    height: int
    steps: int
    guidance: float
    max_size: int
    preview: PreviewSpec | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One quality metric: its text pair, weight in PRS and mean quality of both models."""

    name: str
    positive: str
    negative: str
    weight: float
    mu_edge: float
    mu_cloud: float


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """What the router needs beside its networks; `score_digest` holds ascending score quantiles."""

    metrics: tuple[Metric, ...]
    gamma: float
    floor: float
    score_digest: tuple[float, ...]
    default_share: float
    text_encoder: str
    predictor: str


@dataclass(frozen=True, slots=True)
class CriticSpec:
    """What looking at the edge's pictures needs beside its networks `text_encoder` and `network`.

    Pictures are seen `side` pixels square: all of them, if `squashed`, else their middle square.
    `score_digest` is that of scores after a look.
    """

    side: int
    squashed: bool
    score_digest: tuple[float, ...]
    text_encoder: str
    network: str


@dataclass(frozen=True, slots=True)
class RecognizerSpec:
    """What recognition needs beside its networks `backbone`, `head` and `adapted`.

    Pictures are read `side` pixels square, of which `crop` is kept; features have `width` values
    and are those of the backbone named by `digest`. `history` earlier pictures serve best; with
    fewer than `least_history` the backbone's own `head` answers, always where that is None.
    """

    classes: tuple[str, ...]
    side: int
    crop: float
    width: int
    digest: str
    history: int
    least_history: int | None
    backbone: str
    head: str
    adapted: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle; `tokenizers` holds one for each text encoder, by component.

    `loss` is that of all its components together, None where none is lowered.
    """

    path: Path
    format: int
    created_by: str
    created_at: str
    components: Mapping[str, Component]
    tokenizers: Mapping[str, TokenizerFiles]
    diffusion: DiffusionSpec
    router: RouterSpec
    critic: CriticSpec | None = None
    recognizer: RecognizerSpec | None = None
    loss: Loss | None = None

    def path_of(self, component: str) -> Path:
        """Return the ONNX file of a component."""
        return self.path / self.component(component).file

    def component(self, name: str) -> Component:
        """Return a component by name; raise BundleError when the bundle has none."""
        if name not in self.components:
            raise BundleError(f"the bundle {self.path} has no component {name!r}; {REBUILD}")
        return self.components[name]


def default_path() -> Path:
    """Return where the bundle lives unless told otherwise: the user's data folder."""
    import platformdirs

    return Path(platformdirs.user_data_dir("routet2i-edge")) / "bundle"


def open_bundle(
    path: str | os.PathLike[str],
    verify: bool = True,
    *,
    cache_path: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Read `bundle.json` under `path` and check every file it names.

    `verify=False` skips the digests but not presence and size. Raises BundleError that names the
    file at fault and what to do.
    """
    from edge_agent.manifest import read_manifest  # it needs what is above

    path = Path(path)
    bundle = read_manifest(path)
    records = {
        relative: record
        for component in bundle.components.values()
        for relative, record in component.files.items()
    }
    for tokenizer in bundle.tokenizers.values():
        records[tokenizer.file] = tokenizer.record
    for relative, record in records.items():
        check_size(path, relative, record)
    if verify:
        check_digests(path, records, None if cache_path is None else Path(cache_path))
    return bundle
