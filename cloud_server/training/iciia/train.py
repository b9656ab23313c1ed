"""From a source of pictures to a recogniser's folder: backbone, features, module, gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cloud_server.errors import ModelError
from cloud_server.training.iciia.backbone import (
    SMALL_CHANNELS,
    Backbone,
    features_of,
    open_backbone,
    train_backbone,
)
from cloud_server.training.iciia.gate import least_history
from cloud_server.training.iciia.learn import SEQUENCE, Cohort, Schedule
from cloud_server.training.iciia.learn import train as learn
from cloud_server.training.iciia.module import IciiaConfig, tiny_groups
from cloud_server.training.iciia.recognizer import Recognizer
from cloud_server.training.iciia.samples import (
    Ints,
    Samples,
    by_client,
    mixed_clients,
    read_manifest,
)
from cloud_server.training.iciia.worlds import SIDE, EmojiWorld, omniglot
from cloud_server.training.loop import Budget


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train; the fields are the flags of `cloud-server train-recognizer`."""

    source: str
    omniglot: Path
    clients: str | None
    work: Path
    layers: int
    groups: int | None
    dropout: float
    schedule: Schedule
    device: str
    backbone: str | None
    backbone_budget: Budget
    form: str
    heterogeneity: float
    seed: int


def open_source(source: str, omniglot_folder: Path, backbone: Backbone | None) -> Samples:
    """Return the pictures of a world or of a manifest, as large as the backbone wants them."""
    if source in ("emoji", "omniglot"):
        samples = EmojiWorld().samples() if source == "emoji" else omniglot(omniglot_folder)
        if backbone and backbone.side != samples.side:
            raise ModelError(
                f"the backbone takes pictures of {backbone.side} pixels, and those of {source} "
                f"have {samples.side}; take one for that size"
            )
        return samples
    side, crop = (backbone.side, backbone.crop) if backbone else (SIDE, 1.0)
    return read_manifest(Path(source), side, crop)


def clients_of(samples: Samples, clients: str | None) -> Ints:
    """Return everybody's client (N,), by the first definition where none is named.

    Raises ModelError for a definition there is none of, and where no client has two pictures to
    validate by: then nothing could tell whether the module helps.
    """
    known = list(samples.clients)
    name = clients or known[0]
    if name not in known:
        raise ModelError(f"there are no clients by {name!r} here; choose {' or '.join(known)}")
    found = samples.clients[name]
    if max(map(len, by_client(found, samples.of("val")))) < 2:
        raise ModelError(
            "no client has two pictures of the split 'val', so whether a history helps cannot be "
            "validated; give some clients more"
        )
    return found


def cohort_of(samples: Samples, features: torch.Tensor, clients: str | None) -> Cohort:
    """Put features beside labels and clients; raises ModelError as `clients_of`."""
    return Cohort(features, samples.labels, samples.splits, clients_of(samples, clients))


def cohort_with(
    backbone: Backbone,
    source: str,
    omniglot_folder: Path,
    clients: str | None,
    work: Path,
    device: str,
) -> Cohort:
    """Return the features that a backbone makes of a source, with clients; raises ModelError."""
    samples = open_source(source, omniglot_folder, backbone)
    _check_classes(backbone, samples, source)
    return cohort_of(samples, _features(backbone, samples, work, device), clients)


def _features(backbone: Backbone, samples: Samples, work: Path, device: str) -> torch.Tensor:
    features = torch.from_numpy(features_of(backbone, samples, work, device))
    backbone.to("cpu")  # what follows is small, and lies there
    return features


def _check_classes(backbone: Backbone, samples: Samples, source: str) -> None:
    known = backbone.classifier.out_features
    if known != len(samples.classes):
        raise ModelError(
            f"the backbone knows {known} classes, but {source} has {len(samples.classes)}; take "
            "one that was trained on these"
        )


def _config(plan: Plan, width: int, classes: int) -> IciiaConfig:
    groups = (plan.groups or tiny_groups(width)) if plan.form == "tiny" else 1
    return IciiaConfig(width, classes, plan.layers, groups=groups, dropout=plan.dropout)


def train(plan: Plan, out: Path) -> Iterator[str]:
    """Train and write the recogniser; yield what is worth telling. Raises ModelError."""
    backbone = open_backbone(plan.backbone) if plan.backbone else None
    samples = open_source(plan.source, plan.omniglot, backbone)
    clients_of(samples, plan.clients)
    config = _config(plan, backbone.width if backbone else SMALL_CHANNELS[-1], len(samples.classes))
    yield f"{len(samples.labels)} pictures of {len(samples.classes)} classes"
    if backbone is None:
        backbone = train_backbone(samples, plan.work, plan.backbone_budget, plan.seed, plan.device)
    else:
        backbone.round_as_saved()
    _check_classes(backbone, samples, plan.source)
    features = _features(backbone, samples, plan.work, plan.device)
    cohort = cohort_of(samples, features, plan.clients)
    with torch.inference_mode():
        named = backbone.classifier(features).argmax(-1)
    plain = float((named.numpy() == samples.labels)[samples.of("val")].mean())
    yield f"the backbone alone names {plain:.2%} of the validation pictures rightly"
    mixed = mixed_clients(cohort.clients, cohort.splits, plan.heterogeneity, plan.seed)
    learnt = Cohort(features, cohort.labels, cohort.splits, mixed)
    model, right = learn(
        learnt, config, plan.schedule, plan.seed, plan.work, start=backbone.classifier
    )
    yield f"with others of the same client, {SEQUENCE} at a time, {right:.2%}"
    least = least_history(model, named, cohort, plan.seed)
    if least is None:
        yield (
            "it would mislead clients who are all alike, whatever their history, and is never "
            "asked; train with more --strangers"
        )
    else:
        yield f"it is asked from {least} picture{'s' * (least > 1)} of history on"
    about = {
        "source": plan.source,
        "clients": plan.clients or next(iter(samples.clients)),
        "heterogeneity": plan.heterogeneity,
        "seed": plan.seed,
        "schedule": asdict(plan.schedule),
        "validation": {"backbone": plain, "iciia": right},
    }
    Recognizer(backbone, model, least, samples.classes, about).save(out)
