"""Read the manifest of a bundle, `bundle.json`; the only reader of its format."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path, PurePosixPath
from re import fullmatch
from typing import Any, TypeVar

from edge_agent.bundle import (
    FORMAT,
    MANIFEST,
    Bundle,
    Component,
    CriticSpec,
    DiffusionSpec,
    Loss,
    Metric,
    Parity,
    PreviewSpec,
    RecognizerSpec,
    RouterSpec,
    TokenizerFiles,
)
from edge_agent.config import LONGEST_HISTORY
from edge_agent.errors import REBUILD, BundleError
from edge_agent.verified import FileRecord

T = TypeVar("T")


def read_manifest(path: Path) -> Bundle:
    """Return what `bundle.json` under `path` says; raise BundleError that names what is wrong."""
    content = _content(path)
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
        critic=_critic(root.child("critic")) if "critic" in content else None,
        recognizer=_recognizer(root.child("recognizer")) if "recognizer" in content else None,
        loss=_loss(root),
    )
    encoders = (bundle.router.text_encoder, *bundle.diffusion.text_encoders)
    needed = [*encoders, bundle.router.predictor, bundle.diffusion.denoiser, "vae_decoder"]
    if bundle.diffusion.preview:
        needed.append(bundle.diffusion.preview.decoder)
    if bundle.critic:
        encoders = (*encoders, bundle.critic.text_encoder)
        needed += [bundle.critic.text_encoder, bundle.critic.network]
    if spec := bundle.recognizer:
        needed += [spec.backbone, spec.head, spec.adapted]
    for name in needed:
        bundle.component(name)
    for name in encoders:
        tokenizers.child(name)
    return bundle


def _content(path: Path) -> dict[str, Any]:
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
            raise self.error("" if where else "its root", "object")
        self.content = content

    def error(self, key: str, kind: str) -> BundleError:
        """Return what to raise for the value of a key that is not of a kind."""
        path = f"{self.where}{key}"
        return BundleError(f"{self.manifest} has no usable {path!r} (expected {kind}); {REBUILD}")

    def check(self, key: str, valid: object, kind: str) -> None:
        """Raise for the value of a key that is not valid."""
        if not valid:
            raise self.error(key, kind)

    def get(self, key: str, kind: type[T]) -> T:
        value = self.content.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, kind.__name__)
        return value

    def maybe(self, key: str, kind: type[T]) -> T | None:
        return None if self.content.get(key) is None else self.get(key, kind)

    def or_null(self, key: str, kind: type[T]) -> T | None:
        """Return a value that may be null but must be told, unlike one of `maybe`."""
        return self.maybe(key, kind) if key in self.content else self.get(key, kind)

    def one_of(self, key: str, *values: str) -> str:
        value = self.get(key, str)
        if value not in values:
            raise self.error(key, " or ".join(values))
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
    spec = DiffusionSpec(
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
    for key in ("latent_channels", "vae_scale", "size_step", "width", "height", "steps"):
        fields.check(key, getattr(spec, key) > 0, "a number above 0")
    fields.check("text_encoders", spec.text_encoders, "one name or more")
    fields.check("scaling_factor", _is_scale(spec.scaling_factor), "a number other than 0")
    fields.check("shift_factor", math.isfinite(spec.shift_factor), "a number")
    fields.check("guidance", 0 <= spec.guidance < math.inf, "a number from 0 on")
    return spec


def _is_scale(number: float) -> bool:
    return math.isfinite(number) and number != 0


def _preview(fields: _Fields) -> PreviewSpec:
    spec = PreviewSpec(
        decoder=fields.get("decoder", str),
        scaling_factor=fields.get("scaling_factor", float),
        shift_factor=fields.get("shift_factor", float),
    )
    fields.check("scaling_factor", _is_scale(spec.scaling_factor), "a number other than 0")
    return spec


def _router(fields: _Fields) -> RouterSpec:
    spec = RouterSpec(
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
    weights = [metric.weight for metric in spec.metrics]
    one = bool(weights) and min(weights) >= 0 and math.isclose(sum(weights), 1, abs_tol=1e-4)
    fields.check("metrics", one, "one or more, of weights that add up to 1")
    fields.check("score_digest", _rises(spec.score_digest), "scores that rise")
    fields.check("default_share", 0 <= spec.default_share <= 1, "a share from 0 to 1")
    return spec


def _rises(digest: tuple[float, ...]) -> bool:
    ordered = all(a <= b for a, b in pairwise(digest))
    return bool(digest) and ordered and all(map(math.isfinite, digest))


def _critic(fields: _Fields) -> CriticSpec:
    spec = CriticSpec(
        side=fields.get("side", int),
        squashed=fields.get("squashed", bool),
        score_digest=fields.all_of("score_digest", float),
        text_encoder=fields.get("text_encoder", str),
        network=fields.get("network", str),
    )
    fields.check("side", spec.side > 0, "a number of pixels")
    fields.check("score_digest", _rises(spec.score_digest), "scores that rise")
    return spec


def _recognizer(fields: _Fields) -> RecognizerSpec:
    spec = RecognizerSpec(
        classes=fields.all_of("classes", str),
        side=fields.get("side", int),
        crop=fields.get("crop", float),
        width=fields.get("width", int),
        digest=fields.get("digest", str),
        history=fields.get("history", int),
        least_history=fields.or_null("least_history", int),
        backbone=fields.get("backbone", str),
        head=fields.get("head", str),
        adapted=fields.get("adapted", str),
    )
    for key, valid, kind in (
        ("side", spec.side > 0, "a number of pixels"),
        ("crop", 0 < spec.crop <= 1, "a share above 0"),
        ("width", spec.width > 0, "a number of features"),
        ("digest", fullmatch("([0-9a-f]{2}){32}", spec.digest), "a SHA-256"),
        ("history", 0 <= spec.history <= LONGEST_HISTORY, f"0 to {LONGEST_HISTORY}"),
        ("least_history", (spec.least_history or 0) >= 0, "null or a number of pictures"),
    ):
        fields.check(key, valid, kind)
    return spec
