"""Open and verify the bundle that `python -m export` wrote; the only reader of its format.

Digests of files that have not changed since they were last verified (same size and modification
time) are taken from a small cache in the user's cache folder, so that opening stays fast.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from edge_agent.errors import BundleError

FORMAT = 2
MANIFEST = "bundle.json"
REBUILD = "run `python -m export` to write it again"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of the bundle must look like."""

    sha256: str
    size: int


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
class RecognizerSpec:
    """What recognition needs beside its networks `backbone`, `head` and `adapted`.

    Pictures are read `side` pixels square, of which `crop` is kept; features have `width` values
    and are those of the backbone named by `digest`. `history` earlier pictures serve best.
    """

    classes: tuple[str, ...]
    side: int
    crop: float
    width: int
    digest: str
    history: int
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


def open_bundle(path: Path, verify: bool = True, *, cache_path: Path | None = None) -> Bundle:
    """Read `bundle.json` under `path` and check every file it names.

    `verify=False` skips the digests but not presence and size. Raises BundleError that names the
    file at fault and what to do.
    """
    bundle = _parse(path, _read_manifest(path))
    records = {
        relative: record
        for component in bundle.components.values()
        for relative, record in component.files.items()
    }
    for tokenizer in bundle.tokenizers.values():
        records[tokenizer.file] = tokenizer.record
    for relative, record in records.items():
        _check_size(path, relative, record)
    if verify:
        _check_digests(path, records, cache_path or _default_cache_path())
    return bundle


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = path / MANIFEST
    try:
        raw = manifest.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as err:
        if path.with_name(path.name + ".partial").exists():
            raise BundleError(
                f"the bundle {path} is only half written; run `python -m export` again to finish it"
            ) from err
        raise BundleError(
            f"there is no bundle at {path}; run `python -m export` to make one there, "
            "or point --bundle or EDGE_AGENT_BUNDLE at another folder"
        ) from err
    except OSError as err:
        raise BundleError(f"cannot read {manifest} ({err.strerror}); check its owner") from err
    try:
        content = json.loads(raw)
    except ValueError as err:
        raise BundleError(f"{manifest} is not valid JSON ({err}); {REBUILD}") from err
    version = content.get("format") if isinstance(content, dict) else None
    if not isinstance(version, int) or version < 1:
        raise BundleError(f"{manifest} is not a bundle manifest (format {version!r}); {REBUILD}")
    if version > FORMAT:
        raise BundleError(
            f"the bundle {path} has format {version}, made by a newer version of routet2i-edge "
            f"than this one, which reads format {FORMAT}; upgrade routet2i-edge"
        )
    if version < FORMAT:
        raise BundleError(
            f"the bundle {path} has format {version}, made by an older version of routet2i-edge "
            f"than this one, which reads format {FORMAT}; {REBUILD}"
        )
    return content


class _Fields:
    """Typed access to a JSON object that names the missing or wrong key, with its path."""

    def __init__(self, content: object, where: str, manifest: Path) -> None:
        self.where, self.manifest = where, manifest
        if not isinstance(content, dict):
            raise self._error(where or "its root", "object")
        self.content = content

    def _error(self, key: str, kind: str) -> BundleError:
        return BundleError(f"{self.manifest} has no usable {key!r} (expected {kind}); {REBUILD}")

    def get(self, key: str, kind: type[T]) -> T:
        value = self.content.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._error(f"{self.where}{key}", kind.__name__)
        return value

    def maybe(self, key: str, kind: type[T]) -> T | None:
        return None if self.content.get(key) is None else self.get(key, kind)

    def one_of(self, key: str, *values: str) -> str:
        value = self.get(key, str)
        if value not in values:
            raise self._error(f"{self.where}{key}", " or ".join(values))
        return value

    def child(self, key: str) -> _Fields:
        return _Fields(self.content.get(key), f"{self.where}{key}.", self.manifest)

    def items(self, key: str) -> list[_Fields]:
        return [
            _Fields(item, f"{self.where}{key}[{index}].", self.manifest)
            for index, item in enumerate(self.get(key, list))
        ]

    def all_of(self, key: str, kind: type[T]) -> tuple[T, ...]:
        values = self.get(key, list)
        wrapped = _Fields(
            {str(index): value for index, value in enumerate(values)},
            f"{self.where}{key}.",
            self.manifest,
        )
        return tuple(wrapped.get(index, kind) for index in wrapped.content)

    def relative_path(self, value: str) -> str:
        parts = PurePosixPath(value)
        if not value or parts.is_absolute() or ".." in parts.parts or "\\" in value:
            raise BundleError(f"{self.manifest} names {value!r}, outside the bundle; {REBUILD}")
        return value

    def record(self) -> FileRecord:
        return FileRecord(sha256=self.get("sha256", str), size=self.get("size", int))


def _parse(path: Path, content: dict[str, Any]) -> Bundle:
    root = _Fields(content, "", path / MANIFEST)
    components = root.child("components")
    tokenizers = root.child("tokenizers")
    bundle = Bundle(
        path=path,
        format=root.get("format", int),
        created_by=root.get("created_by", str),
        created_at=root.get("created_at", str),
        components={name: _component(name, components.child(name)) for name in components.content},
        tokenizers={name: _tokenizer(tokenizers.child(name)) for name in tokenizers.content},
        diffusion=_diffusion(root.child("diffusion")),
        router=_router(root.child("router")),
        recognizer=_recognizer(root.child("recognizer")) if "recognizer" in content else None,
        loss=_loss(root),
    )
    encoders = (bundle.router.text_encoder, *bundle.diffusion.text_encoders)
    needed = [*encoders, bundle.router.predictor, bundle.diffusion.denoiser, "vae_decoder"]
    if bundle.diffusion.preview:
        needed.append(bundle.diffusion.preview.decoder)
    if spec := bundle.recognizer:
        needed += [spec.backbone, spec.head, spec.adapted]
    for name in needed:
        bundle.component(name)
    for name in encoders:
        tokenizers.child(name)
    return bundle


def _component(name: str, fields: _Fields) -> Component:
    files = fields.child("files")
    parity = fields.child("parity")
    return Component(
        name=name,
        file=fields.relative_path(fields.get("file", str)),
        files={fields.relative_path(each): files.child(each).record() for each in files.content},
        opset=fields.get("opset", int),
        precision=fields.get("precision", str),
        inputs=fields.all_of("inputs", str),
        outputs=fields.all_of("outputs", str),
        parity=Parity(
            metric=parity.get("metric", str),
            value=parity.get("value", float),
            gate=parity.get("gate", float),
        ),
        source=fields.get("source", str),
        optimized=fields.get("optimized", bool),
        loss=_loss(fields),
    )


def _loss(parent: _Fields) -> Loss | None:
    if parent.content.get("loss") is None:
        return None
    fields = parent.child("loss")
    return Loss(
        psnr_db=fields.maybe("psnr_db", float),
        picture_psnr_db=fields.maybe("picture_psnr_db", float),
        flips=fields.maybe("flips", float),
        accepted=fields.get("accepted", bool),
    )


def _tokenizer(fields: _Fields) -> TokenizerFiles:
    return TokenizerFiles(
        file=fields.relative_path(fields.get("file", str)),
        record=fields.record(),
        context_length=fields.get("context_length", int),
        pad_id=None if fields.content.get("pad_id", 0) is None else fields.get("pad_id", int),
    )


def _diffusion(fields: _Fields) -> DiffusionSpec:
    return DiffusionSpec(
        family=fields.get("family", str),
        model=fields.get("model", str),
        digest=fields.get("digest", str),
        denoiser=fields.get("denoiser", str),
        text_encoders=fields.all_of("text_encoders", str),
        text_states=fields.one_of("text_states", "hidden", "penultimate"),
        empty_is_zeros=fields.get("empty_is_zeros", bool),
        scheduler=fields.get("scheduler", dict),
        latent_channels=fields.get("latent_channels", int),
        vae_scale=fields.get("vae_scale", int),
        size_step=fields.get("size_step", int),
        scaling_factor=fields.get("scaling_factor", float),
        shift_factor=fields.get("shift_factor", float),
        width=fields.get("width", int),
        height=fields.get("height", int),
        steps=fields.get("steps", int),
        guidance=fields.get("guidance", float),
        max_size=fields.get("max_size", int),
        preview=_preview(fields.child("preview")) if fields.content.get("preview") else None,
    )


def _preview(fields: _Fields) -> PreviewSpec:
    return PreviewSpec(
        decoder=fields.get("decoder", str),
        scaling_factor=fields.get("scaling_factor", float),
        shift_factor=fields.get("shift_factor", float),
    )


def _router(fields: _Fields) -> RouterSpec:
    return RouterSpec(
        metrics=tuple(
            Metric(
                name=metric.get("name", str),
                positive=metric.get("positive", str),
                negative=metric.get("negative", str),
                weight=metric.get("weight", float),
                mu_edge=metric.get("mu_edge", float),
                mu_cloud=metric.get("mu_cloud", float),
            )
            for metric in fields.items("metrics")
        ),
        gamma=fields.get("gamma", float),
        floor=fields.get("floor", float),
        score_digest=fields.all_of("score_digest", float),
        default_share=fields.get("default_share", float),
        text_encoder=fields.get("text_encoder", str),
        predictor=fields.get("predictor", str),
    )


def _recognizer(fields: _Fields) -> RecognizerSpec:
    return RecognizerSpec(
        classes=fields.all_of("classes", str),
        side=fields.get("side", int),
        crop=fields.get("crop", float),
        width=fields.get("width", int),
        digest=fields.get("digest", str),
        history=fields.get("history", int),
        backbone=fields.get("backbone", str),
        head=fields.get("head", str),
        adapted=fields.get("adapted", str),
    )


def _check_size(root: Path, relative: str, record: FileRecord) -> None:
    file = root / relative
    try:
        size = file.stat().st_size
    except OSError as err:
        raise BundleError(f"the bundle lacks {file} ({err.strerror}); {REBUILD}") from err
    if size != record.size:
        raise BundleError(
            f"{file} has {size} bytes but the bundle promises {record.size}; {REBUILD}"
        )


def _check_digests(root: Path, records: Mapping[str, FileRecord], cache_path: Path) -> None:
    known = _read_cache(cache_path)
    fresh: dict[str, list[Any]] = {}
    for relative, record in records.items():
        file = (root / relative).resolve()
        stat = file.stat()
        seal = [stat.st_size, stat.st_mtime_ns, record.sha256]
        if known.get(str(file)) == seal:
            continue
        import hashlib  # loads OpenSSL; not needed once everything is in the cache

        with file.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != record.sha256:
            raise BundleError(
                f"{file} is not what was exported (sha256 {actual[:12]}…, expected "
                f"{record.sha256[:12]}…); {REBUILD}"
            )
        fresh[str(file)] = seal
    if fresh:
        _write_cache(cache_path, known | fresh)


def _default_cache_path() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("routet2i-edge")) / "verified.json"


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(path: Path, content: dict[str, Any]) -> None:
    # A cache that cannot be written only means that the digests are computed again next time.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
