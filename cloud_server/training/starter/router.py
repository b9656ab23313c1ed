"""The starter pair's router: both models draw scenes, the starter CLIP judges, a router learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cloud_server.training.encoders import open_encoder
from cloud_server.training.label import PipelinePainter, folder_digest, label, sample_prompts
from cloud_server.training.loop import Budget
from cloud_server.training.quality import QualityScorer
from cloud_server.training.router import Settings
from cloud_server.training.router_folder import Material, report, train_router

PROMPTS = {"cpu": 400, "cuda": 3000}
PICTURES = {"cpu": 16, "cuda": 128}  # drawn at once
ALIGNMENT_WEIGHT = 0.5  # what is drawn counts as much as how it looks


def train_starter_router(
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
    settings: Settings = Settings(predictor="gated"),  # noqa: B008  it is frozen
) -> None:
    """Label prompts with `starter/edge` and `starter/cloud` and train the router in `out`.

    Both draw `prompts` (400, or 3000 on a GPU) with `seeds` pictures each, judged by
    `starter/clip`; `calibration` more prompts only set the threshold. Labels and training state
    stay in `work`, so that a killed run resumes.
    """
    kind = torch.device(device).type
    count = prompts or PROMPTS[kind]
    scorer = QualityScorer.open(starter / "clip", device=device, alignment=ALIGNMENT_WEIGHT)
    sampled = sample_prompts(count + calibration, seed)
    texts = [prompt.text for prompt in sampled]
    painters = [PipelinePainter(starter / name, device) for name in ("edge", "cloud")]
    labels = label(
        *painters,
        scorer,
        texts[:count],
        range(seeds),
        work,
        judge=folder_digest(starter / "clip"),
        batch=PICTURES[kind],
    )
    edge, cloud = (
        f"{name}@{painter.digest[:12]}"
        for name, painter in zip(("edge", "cloud"), painters, strict=True)
    )
    del painters
    material = Material(labels, scorer.metrics, (edge, cloud), texts[count:])
    encoder = open_encoder(starter / "edge")
    trained = train_router(material, encoder, out, work, budget, seed, device, settings)
    print(f"\n{report(trained, material)}")
    objects = np.array([prompt.objects for prompt in sampled[:count]])
    for many in np.unique(objects):
        mine = trained.true[objects == many]
        print(f"{many} object(s): the cloud is better on {np.mean(mine < 0.5):.0%} of {len(mine)}")
