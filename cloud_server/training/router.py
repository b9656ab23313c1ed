"""Train the router of a pair of models: labels, superiority, predictor, score digest.

Nothing here is drawn for the calibration: the threshold depends on predicted scores only, so the
digest comes from many fresh prompts that no picture was made for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cloud_server.torchvision_guard import guard
from cloud_server.training.labels import Labels, PipelinePainter, label, sample_prompts
from cloud_server.training.loop import Budget, fit
from cloud_server.training.predictor import Predictor, PredictorConfig
from cloud_server.training.quality import ALIGNMENT_WEIGHT, Alignment, Clip, QualityScorer
from edge_agent.routing.pareto import FLOOR, fit_gamma, prs, quality_distance
from edge_agent.routing.policy import score_digest, threshold

guard()
from transformers import CLIPTextModel, CLIPTokenizerFast  # noqa: E402  the guard must come first

BATCH = 64
MAX_EPOCHS, MIN_STEPS = 40, 200  # after more, some hundred prompts are learnt by heart
PROMPTS = {"cpu": 400, "cuda": 3000}
PICTURES = {"cpu": 16, "cuda": 128}  # drawn at once
HELD_OUT = 0.2
DEFAULT_SHARE = 0.3
PROBE = "two red apples to the left of a cat"


@dataclass(frozen=True, slots=True)
class Features:
    """Frozen hidden states (N, n, d) and masks (N, n), 1 on the tokens of the prompt itself."""

    hidden: Tensor
    mask: Tensor

    def at(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return hidden states and masks of some prompts."""
        return self.hidden[rows], self.mask[rows]


def train_router(
    starter: Path,
    out: Path,
    work: Path,
    budget: Budget,
    seed: int,
    device: str,
    *,
    prompts: int | None = None,
    seeds: int = 2,
    calibration: int = 2000,
    edge: Path | None = None,
    cloud: Path | None = None,
) -> None:
    """Label prompts with both models, train the predictor and write it with router.json to `out`.

    The models are `starter/edge` and `starter/cloud` unless given, judged by `starter/clip`. Both
    draw `prompts` (400, or 3000 on a GPU) with `seeds` pictures each; `calibration` more prompts
    are only predicted. Labels and training state stay in `work`, so that a killed run resumes.
    """
    torch.manual_seed(seed)
    kind = torch.device(device).type
    prompts = prompts or PROMPTS[kind]
    edge, cloud = edge or starter / "edge", cloud or starter / "cloud"
    sampled = sample_prompts(prompts + calibration, seed)
    texts = [prompt.text for prompt in sampled]
    scorer = QualityScorer(
        Clip(starter / "clip", device=device),
        alignment=Alignment(ALIGNMENT_WEIGHT, tuple(texts[:prompts])),
    )
    painters = PipelinePainter(edge, device), PipelinePainter(cloud, device)
    labels = label(
        *painters,
        scorer,
        texts[:prompts],
        range(seeds),
        work,
        batch=PICTURES[kind],
    )
    digests = [painter.digest for painter in painters]
    del painters

    weights = np.array([metric.weight for metric in scorer.metrics])
    weights = weights / weights.sum()
    order = np.random.default_rng(seed).permutation(prompts)
    held_out, training = np.split(order, [max(1, round(HELD_OUT * prompts))])
    mu, gamma, d = distances(labels, training)
    features = encode(edge, texts, device)
    model = fit_predictor(features, d, weights, training, labels.digest, work, budget, seed, device)
    predicted = prs(predict(model, features, device), weights)
    digest = score_digest(1.0 - predicted[prompts:])

    report(predicted[:prompts], prs(d, weights), [p.objects for p in sampled[:prompts]], held_out)
    limit = threshold(digest, DEFAULT_SHARE)
    sent = np.mean(1.0 - predicted[held_out] > limit)
    print(f"share {DEFAULT_SHARE:.0%}: threshold {limit:.3f}, sends {sent:.0%} of held-out prompts")

    facts = {
        "metrics": [
            {
                "name": metric.name,
                "positive": metric.positive,
                "negative": metric.negative,
                "weight": float(weight),
                "mu_edge": float(mu_edge),
                "mu_cloud": float(mu_cloud),
            }
            for metric, weight, mu_edge, mu_cloud in zip(scorer.metrics, weights, *mu, strict=True)
        ],
        "gamma": gamma,
        "floor": FLOOR,
        "score_digest": digest,
        "default_share": DEFAULT_SHARE,
        "top_k": model.config.top_k,
        "edge_model": f"{edge.name}@{digests[0][:12]}",
        "cloud_model": f"{cloud.name}@{digests[1][:12]}",
        "text_probe": {"prompt": PROBE, "state": text_state(edge, PROBE, device)},
        "seed": seed,
    }
    save_router(model, facts, out)


def distances(
    labels: Labels, training: NDArray[np.int64]
) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
    """Return mu (2, k) and Gamma of the training prompts, and D (N, k) of all.

    Qualities are averaged over seeds first: D of an average is less noisy than an average of D.
    """
    q_edge, q_cloud = labels.q.mean(axis=2)
    mu_edge, mu_cloud = q_edge[training].mean(0), q_cloud[training].mean(0)
    gamma = fit_gamma(q_edge[training], q_cloud[training], mu_edge, mu_cloud)
    d = quality_distance(q_edge, q_cloud, mu_edge, mu_cloud, gamma)
    return np.stack([mu_edge, mu_cloud]), gamma, d


@torch.inference_mode()
def encode(model: Path, prompts: Sequence[str], device: str) -> Features:
    """Run the text encoder of a diffusers folder on prompts."""
    # As on the device, control tokens that were typed are text; the slow class cannot do that.
    tokenizer = CLIPTokenizerFast.from_pretrained(model / "tokenizer", split_special_tokens=True)
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder", torch_dtype=torch.float32)
    encoder.to(device).eval()
    hidden, masks = [], []
    for start in tqdm(range(0, len(prompts), BATCH), desc="prompts", mininterval=2.0):
        rows = list(prompts[start : start + BATCH])
        tokens = tokenizer(rows, padding="max_length", truncation=True, return_tensors="pt")
        position = torch.arange(tokens.input_ids.shape[1])
        last = tokens.attention_mask.sum(1, keepdim=True) - 1  # the end token
        masks.append(((position > 0) & (position < last)).float())
        hidden.append(encoder(tokens.input_ids.to(device)).last_hidden_state.cpu())
    return Features(torch.cat(hidden), torch.cat(masks))


def text_state(model: Path, prompt: str, device: str) -> list[float]:
    """Return the end token's state (d,): by it an export knows the text encoder of the router."""
    features = encode(model, [prompt], device)
    end = int(features.mask[0].sum()) + 1
    return [round(value, 4) for value in features.hidden[0, end].tolist()]


def fit_predictor(
    features: Features,
    d: NDArray[np.float64],
    weights: NDArray[np.float64],
    training: NDArray[np.int64],
    name: str,
    work: Path,
    budget: Budget,
    seed: int,
    device: str,
) -> Predictor:
    """Train the predictor on D (N, k): soft-label cross-entropy per metric and MSE on PRS."""
    most = max(MIN_STEPS, MAX_EPOCHS * len(training) // BATCH)
    config = PredictorConfig(width=features.hidden.shape[-1], experts=d.shape[1])
    model = Predictor(config)
    labels = torch.from_numpy(d).float()
    w = torch.from_numpy(weights).float().to(device)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, step])
        rows = rng.choice(training, min(BATCH, len(training)), replace=False)
        hidden, mask, truth = (x.to(device) for x in (*features.at(rows), labels[rows]))
        guess = model(hidden, mask)
        by_metric = F.binary_cross_entropy(guess, truth)
        overall = F.mse_loss(guess @ w, truth @ w)
        return by_metric + 4.0 * overall, {"bce": by_metric.item(), "prs": overall.item() ** 0.5}

    fit(
        f"router-{name}-{seed}",
        model,
        loss_fn,
        lr=1e-3,
        budget=replace(budget, steps=min(budget.steps or most, most)),
        work=work,
        device=device,
        ema=0.98,
        warmup=50,
        weight_decay=0.1,
    )
    return model


@torch.inference_mode()
def predict(model: Predictor, features: Features, device: str) -> NDArray[np.float64]:
    """Return predicted D (N, k)."""
    batches = zip(features.hidden.split(BATCH), features.mask.split(BATCH), strict=True)
    d = [model(hidden.to(device), mask.to(device)).cpu() for hidden, mask in batches]
    return torch.cat(d).double().numpy()


def report(
    predicted: NDArray[np.float64],
    true: NDArray[np.float64],
    objects: Sequence[int],
    held_out: NDArray[np.int64],
) -> None:
    """Print how well PRS is predicted, and how often the cloud wins by number of objects."""
    kinds = np.array(objects)
    print(
        f"\nprs: correlation of predicted and true {_correlation(predicted, true, held_out):.3f} "
        f"on {len(held_out)} held-out prompts; mean {true.mean():.3f}, spread {true.std():.3f}"
    )
    for count in sorted(set(objects)):
        mine = true[kinds == count]
        print(f"{count} object(s): the cloud is better on {np.mean(mine < 0.5):.0%} of {len(mine)}")


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64], rows: NDArray[np.int64]) -> float:
    if len(rows) < 2 or a[rows].std() == 0 or b[rows].std() == 0:
        return float("nan")
    return float(np.corrcoef(a[rows], b[rows])[0, 1])


def save_router(model: Predictor, facts: dict[str, Any], out: Path) -> None:
    """Write predictor.safetensors, config.json and router.json, replacing `out` as a whole."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    (partial / "router.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
