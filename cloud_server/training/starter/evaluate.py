"""Every number of the model card, with its interval: `cloud-server evaluate-starter`.

Scenes are fresh ones of the given seed. Edge and cloud draw the same captions from the same noise,
and the judge reads both; it reads the true pictures too, as they are and through the autoencoder,
which is as right as drawing can be found to be.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from cloud_server.errors import ModelError
from cloud_server.torchvision_guard import guard
from cloud_server.training.digest import folder_digest
from cloud_server.training.intervals import (
    Estimate,
    auroc,
    average,
    difference,
    rank_correlation,
    share,
)
from cloud_server.training.labels import Labels, PipelinePainter
from cloud_server.training.quality import (
    ALIGNMENT,
    ALIGNMENT_WEIGHT,
    Alignment,
    Clip,
    QualityScorer,
)
from cloud_server.training.router import distances
from cloud_server.training.starter.autoencoder import to_tensor
from cloud_server.training.starter.degradations import degrade
from cloud_server.training.starter.judge import Judge
from cloud_server.training.starter.reading import MEASURES, shares
from cloud_server.training.starter.scenes import (
    NOUNS,
    Pixels,
    Scene,
    caption_negatives,
    describe,
    draw,
    sample_scene,
)
from edge_agent.routing.pareto import prs

guard()
from diffusers import AutoencoderTiny  # noqa: E402  the guard must come first

OBJECTS: Final = (1, 2, 3, 4, 5)
STRENGTHS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
RETRIEVAL: Final = 256  # scenes that the autoencoder and CLIP are measured on
SPOILED: Final = 64  # of these, scenes spoiled in every way at every strength
BATCH: Final = {"cpu": 16, "cuda": 128}
VERSIONS: Final = (
    "routet2i-edge", "numpy", "torch", "diffusers", "transformers", "open_clip_torch",
)  # fmt: skip

Method = Callable[[NDArray[Any], int], Estimate | None]
Report = dict[str, Any]
"""What JSON can hold; every estimate is {"mean", "low", "high", "n"}, or null if nothing counts."""


def evaluate(
    models: Path, judge: Path, seed: int, device: str, pictures: int, compared: int
) -> Report:
    """Measure the models in the folder `models`.

    Each model draws `pictures` captions of every number of objects for the judge, as many more with
    a pairing that training never saw, and as many of the same form without one; and for PRS
    `compared` captions of every number of objects. ModelError where a folder lacks what is needed
    or the judge is of another world.
    """
    if not (models / "edge" / "model_index.json").is_file():
        raise ModelError(
            f"there are no starter models in '{models}'; train them: cloud-server train-starter"
        )
    reader = Judge.open(judge, device)
    unknown = sorted(set(NOUNS) - set(reader.vocabulary.nouns))
    if unknown:
        raise ModelError(
            f"the judge in '{judge}' does not know {', '.join(unknown[:3])} "
            f"({len(unknown)} of {len(NOUNS)} nouns); train it again: "
            "cloud-server train-starter judge"
        )
    rng = np.random.default_rng([seed, 0])
    fresh = [sample_scene(rng) for _ in range(RETRIEVAL)]
    truths = np.stack([draw(scene, rng) for scene in fresh])
    psnr = _psnr(truths, through(models / "cloud" / "vae", truths, device))
    clip = Clip(models / "clip", device=device)
    scorer = QualityScorer(clip)
    return {
        "seed": seed,
        "device": device,
        "pictures": pictures,
        "compared": compared,
        "versions": {"python": platform.python_version(), **{k: version(k) for k in VERSIONS}},
        "models": _sizes(models) | {"judge": folder_digest(judge)[:12]},
        "autoencoder": {"psnr": _plain(average(psnr, seed))},
        "clip": _captions(clip, fresh, truths, seed) | _qualities(scorer, truths[:SPOILED], seed),
        **_drawing(models, reader, seed, device, pictures),
        "cloud_better": _cloud_better(models, clip, seed, device, compared),
    }


def through(vae: Path, pictures: Pixels, device: str) -> Pixels:
    """Return pictures (B, H, W, 3) encoded and decoded by the autoencoder in a folder."""
    model = (
        AutoencoderTiny.from_pretrained(vae, torch_dtype=torch.float32, local_files_only=True)
        .to(device)
        .eval()
    )
    results = []
    with torch.inference_mode():
        for batch in _batches(pictures, "autoencoder"):
            truth = to_tensor(batch, device)
            result = model.decode(model.encode(truth).latents).sample.clamp(-1, 1)
            results.append(result.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(results).numpy()


def _psnr(truths: Pixels, results: Pixels) -> NDArray[np.float64]:
    """Return the PSNR of every picture, in dB."""
    errors = np.square(truths.astype(np.float64) - results).mean((1, 2, 3))
    return np.asarray(10 * np.log10(255**2 / np.maximum(errors, 1e-9)))


def _batches(pictures: Pixels, what: str) -> Iterator[Pixels]:
    for start in tqdm(range(0, len(pictures), 64), desc=what, leave=False):
        yield pictures[start : start + 64]


@torch.inference_mode()
def _captions(clip: Clip, scenes: Sequence[Scene], pictures: Pixels, seed: int) -> Report:
    """Return how well CLIP tells the captions of pictures from others and from wrong ones."""
    rng = np.random.default_rng([seed, 1])
    images = torch.cat([clip.pictures(_images(batch)) for batch in _batches(pictures, "captions")])
    right = clip.texts([scene.caption for scene in scenes])
    nearest = (images @ right.T).argmax(1).cpu().numpy()
    wrong: dict[str, list[str | None]] = {
        "any": [str(rng.choice(caption_negatives(scene, rng))) for scene in scenes],
        # The first wrong caption of a scene with a relation has it turned round.
        "relation": [caption_negatives(s, rng)[0] if s.relation else None for s in scenes],
        "colour": [_colours_swapped(scene) for scene in scenes],
    }
    preferred: Report = {}
    for kind, captions in wrong.items():
        rows, others = zip(*((i, one) for i, one in enumerate(captions) if one), strict=True)
        margins = (images[list(rows)] * (clip.texts(others) - right[list(rows)])).sum(1)
        preferred[kind] = _plain(share((margins > 0).cpu().numpy(), seed))
    retrieval = share(nearest == np.arange(len(scenes)), seed)
    return {"retrieval": _plain(retrieval), "wrong_preferred": preferred}


def _colours_swapped(scene: Scene) -> str | None:
    """Return the caption with the colours of two groups exchanged; None if no two differ."""
    groups = list(scene.groups)
    for i, a in enumerate(groups):
        for j, b in enumerate(groups[:i]):
            if a.colour != b.colour and a.noun != b.noun:
                groups[i], groups[j] = replace(a, colour=b.colour), replace(b, colour=a.colour)
                return describe(replace(scene, groups=tuple(groups)))
    return None


def _qualities(scorer: QualityScorer, pictures: Pixels, seed: int) -> Report:
    """Return how each metric sees its own degradation, and the others.

    AUROC at strength 0.5 against untouched pictures, of each metric on its own degradation and
    `across` all, by degradation and metric; and how orderly the score of one picture falls as its
    own degradation grows: minus Spearman's correlation, averaged over pictures.
    """
    names = [metric.name for metric in scorer.metrics]
    k = len(names)
    scores = np.empty((k, len(STRENGTHS), len(pictures), k))  # by degradation and strength
    scores[:, 0] = scorer.score(_images(pictures))
    for m, name in enumerate(tqdm(names, desc="qualities", leave=False)):
        for level, strength in enumerate(STRENGTHS[1:], start=1):
            spoiled = [
                # Of each picture the same damage at every strength, only stronger.
                degrade(picture, name, strength, np.random.default_rng([seed, 2, m, i]))
                for i, picture in enumerate(pictures.astype(np.float32) / np.float32(255))
            ]
            stack = (np.stack(spoiled) * 255).round().astype(np.uint8)
            scores[m, level] = scorer.score(_images(stack))
    own = scores[np.arange(k), ..., np.arange(k)].transpose(0, 2, 1)  # (k, N, levels)
    middle = STRENGTHS.index(0.5)
    order = -rank_correlation(own, np.broadcast_to(STRENGTHS, own.shape))  # (k, N)
    across = {
        spoilt: {
            name: _plain(auroc(scores[m, 0, :, j], scores[m, middle, :, j], seed))
            for j, name in enumerate(names)
        }
        for m, spoilt in enumerate(names)
    }
    orders = {name: average(order[m], seed) for m, name in enumerate(names)}
    mean = auroc(own[..., 0], own[..., middle], seed)
    return {
        "auroc": {name: across[name][name] for name in names} | {"mean": _plain(mean)},
        "order": {name: _plain(value) for name, value in orders.items()}
        | {"mean": _plain(average(order.mean(0), seed))},
        "across": across,
    }


def _images(pictures: Pixels) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in pictures]


@dataclass(frozen=True, slots=True)
class Exam:
    """Scenes to draw, (3, 5 objects, N) in a row: as in training, with unseen pairings, and twins.

    The twin of an unseen scene has its form and no unseen pairing.
    """

    scenes: list[Scene]
    each: int

    @classmethod
    def sample(cls, each: int, seed: int) -> Exam:
        """Return `each` scenes of one to five objects of every kind."""
        rng = np.random.default_rng([seed, 3])
        totals = [objects for objects in OBJECTS for _ in range(each)]
        usual = [sample_scene(rng, objects) for objects in totals]
        unseen = [sample_scene(rng, objects, unseen=True) for objects in totals]
        twins = []
        for scene in unseen:
            twin = sample_scene(rng, scene.objects)
            while _form(twin) != _form(scene):
                twin = sample_scene(rng, scene.objects)
            twins.append(twin)
        return cls(usual + unseen + twins, each)

    def usual(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values (..., 5, N) of scenes as in training of all values (..., 15N)."""
        return values.reshape(*values.shape[:-1], 3, len(OBJECTS), self.each)[..., 0, :, :]

    def pairs(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values (2, 5N) of unseen scenes and of their twins, NaN where one is."""
        pairs = values.reshape(3, -1)[1:]
        return np.where(np.isnan(pairs).any(0), np.nan, pairs)


def _form(scene: Scene) -> tuple[Any, ...]:
    """Return what makes scenes as hard as each other but for their words."""
    groups = sorted((group.count, group.colour is not None) for group in scene.groups)
    return *groups, scene.relation is not None


def _drawing(models: Path, judge: Judge, seed: int, device: str, pictures: int) -> Report:
    """Return what the judge finds right in true and in drawn pictures."""
    exam = Exam.sample(pictures, seed)
    rng = np.random.default_rng([seed, 4])
    truths = np.stack([draw(scene, rng) for scene in exam.scenes])
    drawn = {"truth": truths, "decoded": through(models / "cloud" / "vae", truths, device)}
    seconds = {}
    for name in ("edge", "cloud"):
        drawn[name], seconds[name] = _draw(models / name, exam.scenes, seed, device)
    right = {name: shares(exam.scenes, judge.read(stack)) for name, stack in drawn.items()}
    gain = {k: right["cloud"][k] - right["edge"][k] for k in MEASURES}
    return {
        "right": {
            name: {k: _by_objects(exam.usual(values), seed) for k, values in measures.items()}
            for name, measures in right.items()
        },
        "gain": {k: _by_objects(exam.usual(gain[k]), seed, difference) for k in MEASURES},
        "unseen": {
            name: {k: _unseen(exam.pairs(right[name][k]), seed) for k in MEASURES} for name in drawn
        },
        "seconds": seconds,
    }


def _draw(folder: Path, scenes: Sequence[Scene], seed: int, device: str) -> tuple[Pixels, float]:
    """Return the pictures that a model draws of captions, and the seconds that one takes."""
    painter = PipelinePainter(folder, device)
    prompts = [scene.caption for scene in scenes]
    painter.draw(prompts[:1], [seed])  # the first is slow
    images: list[Image.Image] = []
    began = time.perf_counter()
    size = BATCH[torch.device(device).type]
    for start in tqdm(range(0, len(prompts), size), desc=folder.name, leave=False):
        batch = prompts[start : start + size]
        noise = [seed * 1_000_003 + start + i for i in range(len(batch))]
        images += painter.draw(batch, noise)
    seconds = (time.perf_counter() - began) / len(prompts)
    return np.stack([np.asarray(image) for image in images]), round(seconds, 4)


def _by_objects(values: NDArray[np.float64], seed: int, of: Method = share) -> Report:
    """Return the estimate of values (5, N) for every number of objects, and of all."""
    by_count = {str(k): _plain(of(v, seed)) for k, v in zip(OBJECTS, values, strict=True)}
    return by_count | {"all": _plain(of(values.ravel(), seed))}


def _unseen(pairs: NDArray[np.float64], seed: int) -> Report:
    """Return the estimates of values (2, N) of unseen scenes and their twins, and of the loss."""
    unseen, seen = pairs
    return {
        "unseen": _plain(share(unseen, seed)),
        "seen": _plain(share(seen, seed)),
        "difference": _plain(difference(unseen - seen, seed)),
    }


def _cloud_better(models: Path, clip: Clip, seed: int, device: str, compared: int) -> Report:
    """Return how often PRS says that the cloud's picture of a scene is the better one.

    By the ten looks, and with alignment as the starter router weighs it. A share this near to a
    half needs more pictures than what the judge finds right, so scenes are drawn for it alone.
    """
    rng = np.random.default_rng([seed, 5])
    scenes = [sample_scene(rng, k) for k in OBJECTS for _ in range(compared)]
    drawn = [_draw(models / name, scenes, seed, device)[0] for name in ("edge", "cloud")]
    prompts = [scene.caption for scene in scenes]
    scorer = QualityScorer(clip, alignment=Alignment(ALIGNMENT_WEIGHT, tuple(prompts)))
    q = np.stack([scorer.score(_images(stack), prompts) for stack in drawn])
    names = tuple(metric.name for metric in scorer.metrics)
    labels = Labels(q.astype(np.float64)[:, :, None], tuple(prompts), (seed,), names, "")
    *_, d = distances(labels, np.arange(len(scenes)))
    weights = np.array([metric.weight for metric in scorer.metrics])
    looks = weights * [metric.name != ALIGNMENT for metric in scorer.metrics]

    def rate(weights: NDArray[np.float64]) -> Report:
        better = prs(d, weights / weights.sum()) < 0.5
        return _by_objects(better.reshape(len(OBJECTS), -1).astype(np.float64), seed)

    return {"looks": rate(looks), "router": rate(weights)}


def _sizes(models: Path) -> Report:
    """Return what the models weigh, and by what each folder is known."""
    files = [file for file in models.rglob("*") if file.is_file()]
    return {
        "parameters": {name: _parameters(models / name / "unet") for name in ("edge", "cloud")},
        "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1),
        **{name: folder_digest(models / name)[:12] for name in ("clip", "edge", "cloud")},
    }


def _parameters(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
            total += sum(int(np.prod(shape)) for shape in shapes)
    return total


def _plain(value: Estimate | None) -> Report | None:
    return asdict(value) if value else None
