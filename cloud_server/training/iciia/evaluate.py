"""ICIIA measured beside its baselines and ablations (section 4 of the paper), over seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cloud_server.training.iciia.baselines import fine_tuned, head_trained_on, prompt_tuned
from cloud_server.training.iciia.gate import least_history
from cloud_server.training.iciia.learn import (
    SEQUENCE,
    Cohort,
    Schedule,
    accuracy,
    answers,
    digest_of,
    stream,
    train,
)
from cloud_server.training.iciia.module import Iciia, IciiaConfig
from cloud_server.training.iciia.samples import mixed_clients

HISTORIES = (0, 1, 2, 3, 5, 8, 15, 30, 40, 60)
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of heterogeneity
TARGETS = 4000  # of the test split, for a point of a curve
SWEPT_LAYERS, SWEPT_GROUPS = (1, 2, 3), (1, 4, 16, 64)
BASE, TINY = "ICIIA-B", "ICIIA-T"
# The paper's clients have 62 to 324 labelled pictures to tune with in the mean (its Table 3).
FEW_LABELS = (80, 320)
Told = Callable[[str], None]
Baseline = Callable[[Cohort, nn.Linear, Schedule, int], float]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a cohort, the backbone's own `classifier`, and how to train.

    `tiny` are the sizes of ICIIA-T, of which all other forms are changes. With `sweep` other
    numbers of layers and groups too; if `brief` ICIIA-T alone is trained.
    """

    cohort: Cohort
    classifier: nn.Linear
    tiny: IciiaConfig
    schedule: Schedule
    seeds: tuple[int, ...]
    work: Path
    sweep: bool = False
    brief: bool = False

    @property
    def methods(self) -> dict[str, IciiaConfig]:
        """The forms that are trained, by their names in the report."""
        tiny = self.tiny
        if self.brief:
            return {TINY: tiny}
        return {
            BASE: replace(tiny, groups=1),
            TINY: tiny,
            "ICIIA-T, no shuffle": replace(tiny, shuffle=False),
            "ICIIA-B, convolution for attention": replace(tiny, groups=1, mixing="convolution"),
            "ICIIA-B, no attention": replace(tiny, groups=1, mixing="none"),
        }

    def trained(self, config: IciiaConfig, seed: int, cohort: Cohort | None = None) -> Iciia:
        """Return a form trained on the cohort, or on another one of the same features."""
        return train(
            cohort or self.cohort,
            config,
            self.schedule,
            seed,
            self.work,
            start=self.classifier,
            shown=False,
        )[0]

    def kept(self, name: str, measure: Baseline, seed: int) -> float:
        """Return what a baseline measures, from the folder `work` if it was measured before."""
        about = f"{name} {self.schedule} {seed} {self.cohort.digest()} {digest_of(self.classifier)}"
        file = self.work / f"baseline-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
        if file.is_file():
            return float(json.loads(file.read_text(encoding="utf-8")))
        found = measure(self.cohort, self.classifier, self.schedule, seed)
        self.work.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".partial")
        unfinished.write_text(json.dumps(found), encoding="utf-8")
        unfinished.replace(file)
        return found

    def mixed(self, level: float, seed: int) -> Cohort:
        """Return the cohort with its clients mixed to a heterogeneity level."""
        cohort = self.cohort
        return replace(cohort, clients=mixed_clients(cohort.clients, cohort.splits, level, seed))


def evaluate(subject: Subject, tell: Told = lambda _: None) -> dict[str, Any]:
    """Return the report: accuracies in per cent, each with its mean and standard error."""
    cohort = subject.cohort
    test = cohort.of("test")
    with torch.inference_mode():
        named = subject.classifier(cohort.features).argmax(-1)
    right = (named == torch.from_numpy(cohort.labels)).numpy()
    everyone = np.concatenate(test)
    table: dict[str, list[float]] = {"backbone": [100 * float(right[everyone].mean())]}
    for name, measure in ({} if subject.brief else _baselines(cohort)).items():
        tell(name)
        table[name] = [100 * subject.kept(name, measure, seed) for seed in subject.seeds]
    for name, config in subject.methods.items():
        for seed in subject.seeds:
            tell(f"{name}, seed {seed}")
            model = subject.trained(config, seed)
            table.setdefault(name, []).append(100 * accuracy(model, cohort, test))
    tell("histories")
    histories = _histories(subject, named)
    heterogeneity = _heterogeneity(subject, named, tell)
    swept = {"sweep": _sweep(subject, tell)} if subject.sweep else {}
    return {
        "settings": {
            "schedule": asdict(subject.schedule),
            "layers": subject.tiny.layers,
            "groups of T": subject.tiny.groups,
            "dropout": subject.tiny.dropout,
            "width": subject.tiny.width,
            "classes": subject.tiny.classes,
            "seeds": list(subject.seeds),
            "test pictures": len(everyone),
            "test clients": len(test),
        },
        "accuracy": {name: summary(values) for name, values in table.items()},
        "history": histories,
        "heterogeneity": heterogeneity,
        **swept,
        "cost": _cost(subject.tiny),
    }


def _baselines(cohort: Cohort) -> Mapping[str, Baseline]:
    """Return what can be measured: labels of a client are there only if it was met in training."""
    found: dict[str, Baseline] = {"backbone's head trained on, no client": head_trained_on}
    seen = set(cohort.clients[cohort.splits == 0].tolist())
    if all(int(cohort.clients[client[0]]) in seen for client in cohort.of("test")):
        largest = max(len(client) for client in cohort.of("train"))
        for most in FEW_LABELS:
            if most < largest:
                name = f"fine-tuned head per client, by {most} of its labels"
                found[name] = partial(fine_tuned, most=most)
        found["fine-tuned head per client, by all of its labels"] = fine_tuned
        found["prompt tuning per client, by all of its labels"] = prompt_tuned
    return found


def _sweep(subject: Subject, tell: Told) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy by N (layers) and P (groups), and of the subject's N without the shuffle."""
    cohort, test = subject.cohort, subject.cohort.of("test")
    most = subject.tiny.groups
    sizes = [groups for groups in SWEPT_GROUPS if groups < most and not most % groups] + [most]
    rows = {f"N = {n}": replace(subject.tiny, layers=n) for n in SWEPT_LAYERS}
    rows["no shuffle"] = replace(subject.tiny, shuffle=False)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, config in rows.items():
        for groups in sizes if config.shuffle else sizes[1:]:
            tell(f"{name}, P = {groups}")
            shares = [
                100 * accuracy(subject.trained(replace(config, groups=groups), seed), cohort, test)
                for seed in subject.seeds
            ]
            found.setdefault(name, {})[str(groups)] = summary(shares)
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard error of the mean (None of one value) and the values."""
    spread = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "error": spread, "values": list(values)}


def _cost(config: IciiaConfig) -> dict[str, int]:
    return {
        "parameters": config.projection_parameters,
        "multiply_adds_as_the_paper_counts": config.multiply_adds(SEQUENCE),
        "multiply_adds_of_one_picture": config.multiply_adds_of_one(SEQUENCE),
    }


def _histories(subject: Subject, named: Tensor) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy after k pictures, of targets whose clients have more than k."""
    cohort, test = subject.cohort, subject.cohort.of("test")
    labels, found = torch.from_numpy(cohort.labels), dict[str, dict[str, list[float]]]()
    for seed in subject.seeds:
        forms = {name: form for name, form in subject.methods.items() if name in (BASE, TINY)}
        models = {name: subject.trained(form, seed) for name, form in forms.items()}
        least = least_history(models[TINY], named, cohort, seed)
        for k in HISTORIES:
            met = stream(test, k, seed, TARGETS)
            if not len(met.targets):
                continue
            wanted, plain = labels[met.targets], named[met.targets]
            said = {
                name: answers(model, cohort.features, met).argmax(-1)
                for name, model in models.items()
            }
            asked = least is not None and k >= least
            said |= {"gated": said[TINY] if asked else plain, "backbone": plain}
            for name, answer in said.items():
                share = 100 * (answer == wanted).float().mean().item()
                found.setdefault(name, {}).setdefault(str(k), []).append(share)
    return {n: {k: summary(v) for k, v in curve.items()} for n, curve in found.items()}


def _heterogeneity(subject: Subject, named: Tensor, tell: Told) -> dict[str, dict[str, Any]]:
    """ICIIA-T after 15 pictures: trained at each level, if not brief, or once at 1 and gated.

    Empty where no client has as many.
    """
    labels, found = torch.from_numpy(subject.cohort.labels), dict[str, dict[str, list[float]]]()
    for seed in subject.seeds:
        once = subject.trained(subject.tiny, seed)
        least = least_history(once, named, subject.cohort, seed)
        for level in LEVELS:
            tell(f"heterogeneity {level:g}, seed {seed}")
            cohort = subject.mixed(level, seed)
            met = stream(cohort.of("test"), SEQUENCE - 1, seed, TARGETS)
            if not len(met.targets):
                continue
            wanted, plain = labels[met.targets], named[met.targets]
            asked = least is not None and least <= SEQUENCE - 1
            gated = answers(once, cohort.features, met).argmax(-1) if asked else plain
            said = {"trained at 1, gated": gated, "backbone": plain}
            if not subject.brief:
                model = subject.trained(subject.tiny, seed, cohort)
                said["trained at this level"] = answers(model, cohort.features, met).argmax(-1)
            for name, answer in said.items():
                share = 100 * (answer == wanted).float().mean().item()
                found.setdefault(name, {}).setdefault(f"{level:g}", []).append(share)
    return {n: {k: summary(v) for k, v in curve.items()} for n, curve in found.items()}
