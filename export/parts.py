"""The networks of a bundle, in order: what each is made of, and how its torch module is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from cloud_server.torchvision_guard import guard
from cloud_server.training import predictor as predictors
from cloud_server.training.encoders import TextEncoder
from cloud_server.training.labels.prompts import sample_prompts
from export import components, denoisers
from export.bundle_writer import CRITIC, DECODER, PREVIEW_DECODER
from export.critic import CriticSource
from export.files import digest_of
from export.network import Network
from export.parity import GATES
from export.recognizer import RecognizerSource
from export.sources import Pipeline, RouterFolder
from export.text import Texts
from export.weights import load_sound

guard()
import diffusers  # noqa: E402  the guard must come first

REVISION = 8  # raise when components come out differently, so that none older is kept
# Captions that int8 is rounded by: others than its loss is measured on.
CALIBRATION, CALIBRATION_SEED = 256, 21
NOT_EXPORTED = ("encoder.", "quant_conv.")  # halves of autoencoders


@dataclass(frozen=True, slots=True)
class Part:
    """A network to export: `metric` and `gate` of its parity, and what it is made of.

    `made_of` tells it from every other network; equal ones need not be made again.
    """

    name: str
    metric: str
    gate: float
    made_of: tuple[object, ...]
    load: Callable[[], Network]

    def source(self, precision: str) -> str:
        """Return a digest of all that a component made of this depends on."""
        versions = str(torch.__version__), onnxruntime.__version__
        seal = json.dumps([*self.made_of, REVISION, *versions, precision, self.gate])
        return hashlib.sha256(seal.encode()).hexdigest()


def parts_of(
    pipeline: Pipeline,
    router: RouterFolder,
    texts: Texts,
    critic: CriticSource | None,
    recognizer: RecognizerSource | None,
    gates: Mapping[str, float],
) -> list[Part]:
    """Return all parts of a bundle; `gates` overrides those of parity by component."""
    family, size = pipeline.family, pipeline.latent_size
    context_length = texts.router.context_length

    def part(
        name: str,
        metric: str,
        sources: Sequence[Path],
        load: Callable[[], Network],
        *shape: object,
    ) -> Part:
        gate = gates.get(name, GATES[metric])
        return Part(name, metric, gate, (digest_of(*sources), shape), load)

    def model_of(kind: str, folder: Path) -> Any:
        loaded = getattr(diffusers, kind)
        return load_sound(loaded, folder, spared=NOT_EXPORTED, torch_dtype=torch.float32)

    def text_encoder(each: TextEncoder) -> Network:
        captions = sample_prompts(CALIBRATION, CALIBRATION_SEED)
        tokenizer = each.tokenizer  # made anew whenever it is asked for
        ids = [torch.from_numpy(tokenizer.encode(one.text).input_ids) for one in captions]
        return components.text_encoder(each.tower, each.context_length, ids)

    def denoiser() -> Network:
        model = model_of(family.denoiser_class, pipeline.folder / family.denoiser)
        module = denoisers.WRAPPERS[family.denoiser_class](model, texts.width)
        return denoisers.denoiser(module, size, texts.context_length, step=pipeline.latent_step)

    def vae_decoder(drawn: Pipeline) -> Network:
        return components.vae_decoder(model_of(drawn.vae["_class_name"], drawn.vae_folder), size)

    decoders = {DECODER: pipeline}
    if pipeline.preview is not None and pipeline.preview is not pipeline:
        decoders[PREVIEW_DECODER] = pipeline.preview

    def predictor() -> Network:
        model = predictors.load(router.folder)
        return components.predictor(model, context_length)

    return [
        *(
            part(
                name,
                "cosine",
                each.files,
                partial(text_encoder, each),
                (each.name, each.context_length, each.tower.outputs),
            )
            for name, each in texts.encoders.items()
        ),
        part("predictor", "psnr_db", router.network_files, predictor, context_length),
        *(
            part(
                CRITIC,
                "psnr_db",
                each.files,
                partial(each.network, context_length),
                context_length,
                *each.made_of,
            )
            for each in ([critic] if critic else [])
        ),
        part(
            family.denoiser,
            "psnr_db",
            (pipeline.folder / family.denoiser,),
            denoiser,
            (texts.context_length, texts.width, size),
        ),
        *(
            part(name, "psnr_db", (drawn.vae_folder,), partial(vae_decoder, drawn), size)
            for name, drawn in decoders.items()
        ),
        *(
            part(name, "psnr_db", files, load)
            for name, files, load in (recognizer.parts if recognizer else ())
        ),
    ]
