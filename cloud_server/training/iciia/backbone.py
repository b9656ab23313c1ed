"""The frozen backbone: any classifier of timm, or a small one trained here; its cached features."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from cloud_server.errors import ModelError
from cloud_server.torchvision_guard import guard
from cloud_server.training.iciia.samples import Samples
from cloud_server.training.loop import Budget, fit
from cloud_server.training.precision import autocast
from cloud_server.training.weights import save_weights

guard()
import timm  # noqa: E402  the guard must come first
from timm.models._hub import save_config_for_hf  # noqa: E402  beside the public save_for_hf

SMALL = "resnet10t"  # ours: its four stages this wide, 102 million multiply-adds at 96 pixels
SMALL_CHANNELS = (32, 64, 128, 256)
BATCH = 128
LEARNING_RATE = 2e-3
PART = 256  # pictures at once, as the emoji world draws them: another cut would draw them twice
WEIGHTS = "model.safetensors"


class Backbone(nn.Module):
    """Pictures (B, side, side, 3) of bytes to features (B, D); `classifier` takes these."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        config = network.pretrained_cfg
        self.network: Any = network  # timm's own class, with its methods beside Module's
        self.side, self.crop = int(config["input_size"][-1]), float(config.get("crop_pct") or 1.0)
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).view(3, 1, 1), False)
        self.register_buffer("std", 255 * torch.tensor(config["std"]).view(3, 1, 1), False)

    @property
    def classifier(self) -> nn.Linear:
        """The last projection of the network."""
        classifier = self.network.get_classifier()
        if not isinstance(classifier, nn.Linear):
            raise ModelError(
                f"the backbone ends in {type(classifier).__name__}, not in one linear layer; "
                "choose another architecture"
            )
        return classifier

    @property
    def width(self) -> int:
        """D, the size of a feature vector."""
        return self.classifier.in_features

    def forward(self, pictures: Tensor) -> Tensor:
        images = (pictures.permute(0, 3, 1, 2).float() - self.mean) / self.std
        maps = self.network.forward_features(images)
        return self.network.forward_head(maps, pre_logits=True)

    @torch.no_grad()
    def round_as_saved(self) -> None:
        """Have the weights that `save` keeps; raises ModelError where half precision cannot."""
        for name, weight in self.network.state_dict().items():
            if weight.is_floating_point():
                half = weight.half().float()
                if not half.isfinite().all():
                    raise ModelError(
                        f"the backbone's {name} has values beyond half precision, in which it is "
                        "shipped; choose another, or rescale it"
                    )
                weight.copy_(half)

    def save(self, folder: Path) -> None:
        """Write timm's own folder: config.json and the weights in half precision."""
        folder.mkdir(parents=True, exist_ok=True)
        save_config_for_hf(self.network, str(folder / "config.json"))
        half = {k: v.half() if v.is_floating_point() else v for k, v in _weights(self).items()}
        save_weights(half, folder / WEIGHTS)

    @property
    def digest(self) -> str:
        """Name what the features are made by: changes whenever a weight does."""
        total = hashlib.sha256(f"{self.side} {self.crop}".encode())
        for name, weight in sorted(_weights(self).items()):
            total.update(name.encode() + weight.float().numpy().tobytes())
        return total.hexdigest()


def _weights(backbone: Backbone) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in backbone.network.state_dict().items()}


def small_network(classes: int, side: int) -> Any:
    """Return our small network, untrained."""
    return timm.create_model(
        SMALL,
        num_classes=classes,
        channels=list(SMALL_CHANNELS),
        pretrained_cfg_overlay={"input_size": (3, side, side), "crop_pct": 1.0},
    )


def open_backbone(source: str) -> Backbone:
    """Open a folder that timm or we saved, or fetch a model of timm by its name.

    Raises ModelError.
    """
    folder = Path(source)
    try:
        if (folder / "config.json").is_file():
            network = timm.create_model(f"local-dir:{folder}", pretrained=False)
            network.load_state_dict(load_file(folder / WEIGHTS))
        elif timm.is_model(source.split(".")[0]):
            network = timm.create_model(source, pretrained=True)
        else:
            raise ModelError(
                f"'{source}' is neither a backbone's folder nor a model of timm; name a folder "
                "with config.json and model.safetensors, or a model such as mobilenetv3_large_100"
            )
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError, TypeError) as err:
        said = (str(err) or type(err).__name__).splitlines()[0]
        raise ModelError(
            f"the backbone '{source}' cannot be opened ({said}); fetch or train it again"
        ) from err
    return Backbone(network.eval())


def train_backbone(
    samples: Samples, work: Path, budget: Budget, seed: int, device: str
) -> Backbone:
    """Train the small network on a world's lessons; a killed run on the same goes on."""
    torch.manual_seed(seed)
    name = f"backbone-{hashlib.sha256(f'{samples.digest} {seed}'.encode()).hexdigest()[:16]}"
    out = work / name
    model = Backbone(small_network(len(samples.classes), samples.side))
    model.network.to(memory_format=torch.channels_last)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures, labels = samples.lesson(step, BATCH)
        with autocast(device):
            features = model(torch.from_numpy(pictures).to(device))
            logits = model.classifier(features).float()
        answers = torch.from_numpy(labels).to(device)
        right = (logits.argmax(-1) == answers).float().mean().item()
        value = F.cross_entropy(logits, answers, label_smoothing=0.05)
        return value, {"loss": value.item(), "right": right}

    fit(
        name,
        model,
        loss,
        lr=LEARNING_RATE,
        budget=budget,
        work=work,
        device=device,
        ema=0.998,
        weight_decay=0.05,
        hidden=[w for n, w in model.network.named_parameters() if w.ndim == 4 and "layer" in n],
        on_checkpoint=lambda _: model.save(out),  # it has the weights to ship at that moment
    )
    model.save(out)
    return open_backbone(str(out))  # what is saved in half precision is what features come from


def features_of(backbone: Backbone, samples: Samples, work: Path, device: str) -> NDArray:
    """Return the features (N, D) of all pictures, float32: from `work`, or made and put there.

    What a killed run had made is not made again.
    """
    key = hashlib.sha256(f"{backbone.digest} {samples.digest}".encode()).hexdigest()[:16]
    file = work / f"features-{key}.npy"
    if file.is_file():
        return np.load(file)
    work.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    if not partial.is_file():
        with partial.with_suffix(".empty").open("wb") as stream:
            np.save(stream, np.full((len(samples.labels), backbone.width), np.nan, np.float32))
        os.replace(partial.with_suffix(".empty"), partial)
    features = np.lib.format.open_memmap(partial, "r+")  # what a killed run left stays in it
    backbone.to(device).eval()
    parts = np.split(np.arange(len(features)), range(PART, len(features), PART))
    with torch.inference_mode(), tqdm(total=len(features), desc="features", unit="picture") as bar:
        for indices in parts:
            if np.isnan(features[indices]).any():
                pictures = torch.from_numpy(samples.draw(indices)).to(device)
                features[indices] = backbone(pictures).float().cpu().numpy()
            bar.update(len(indices))
    features.flush()
    os.replace(partial, file)
    return np.load(file)
