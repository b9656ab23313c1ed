"""The starter pair's router: both models draw scenes, the starter CLIP judges, a router learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cloud_server.training.encoders import open_encoder
from cloud_server.training.labels import PipelinePainter, label, sample_prompts
from cloud_server.training.loop import Budget
from cloud_server.training.quality import ALIGNMENT_WEIGHT, Alignment, Clip, QualityScorer
from cloud_server.training.router import Settings
from cloud_server.training.router_folder import Material, report, train_router

PROMPTS = {"cpu": 400, "cuda": 3000}
PICTURES = {"cpu": 16, "cuda": 128}  # drawn at once


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
    sampled = sample_prompts(count + calibration, seed)
    texts = [prompt.text for prompt in sampled]
    scorer = QualityScorer(
        Clip(starter / "clip", device=device),
        alignment=Alignment(ALIGNMENT_WEIGHT, tuple(texts[:count])),
    )
    edge, cloud = (PipelinePainter(starter / name, device) for name in ("edge", "cloud"))
    labels = label(edge, cloud, scorer, texts[:count], range(seeds), work, batch=PICTURES[kind])
    del edge, cloud  # the memory of two diffusion models
    material = Material(labels, texts[count:])
    encoder = open_encoder(starter / "edge")
    trained = train_router(material, encoder, out, work, budget, seed, device, settings)
    print(f"\n{report(trained, material)}")
    objects = np.array([prompt.objects for prompt in sampled[:count]])
    for many in np.unique(objects):
        mine = trained.true[objects == many]
        print(f"{many} object(s): the cloud is better on {np.mean(mine < 0.5):.0%} of {len(mine)}")
