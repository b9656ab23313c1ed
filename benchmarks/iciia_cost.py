"""`python -m benchmarks.iciia_cost`: what ICIIA adds to six backbones, beside the paper's table 1.

Parameters and multiply-adds of the backbones are counted on their timm architectures without
weights; those of ICIIA are section 3.5's formulas, which the tests hold to real counts. With
`--recognizer FOLDER` the time is measured that it adds to a picture on this device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cloud_server.torchvision_guard import guard
from cloud_server.training.iciia.module import IciiaConfig, tiny_groups
from edge_agent.runtime.session import Session
from export.optimise import optimise
from export.quiet import quiet
from export.recognizer import NAMES, RecognizerSource, open_recognizer

guard()
import timm  # noqa: E402  the guard must come first

LAYERS, PICTURES, CLASSES = 3, 16, 1000


@dataclass(frozen=True, slots=True)
class Published:
    """A row of table 1: backbone, then added parameters and multiply-adds of B and T."""

    name: str
    timm_name: str
    side: int
    width: int
    parameters: float
    multiply_adds: float
    b: tuple[float, float]
    t: tuple[float, float]


TABLE_1 = (
    Published("MobileNetV3-L", "mobilenetv3_large_100", 224, 1280, 5.5e6, 0.23e9,
              (30e6, 0.47e9), (0.14e6, 3.8e6)),
    Published("ResNet-152", "resnet152", 224, 2048, 60e6, 12e9, (76e6, 1.2e9), (0.33e6, 7.9e6)),
    Published("EfficientNet-B4", "efficientnet_b4", 380, 1792, 19e6, 4.6e9,
              (58e6, 0.93e9), (0.25e6, 6.4e6)),
    Published("Swin-B", "swin_base_patch4_window7_224", 224, 1024, 88e6, 15e9,
              (19e6, 0.30e9), (0.09e6, 2.8e6)),
    Published("ConvNeXt-L", "convnext_large", 224, 1536, 198e6, 34e9,
              (43e6, 0.68e9), (0.19e6, 5.0e6)),
    Published("EfficientNet-B7", "efficientnet_b7", 600, 2560, 66e6, 39e9,
              (118e6, 1.9e9), (0.50e6, 11e6)),
)  # fmt: skip


def added(width: int, groups: int) -> tuple[int, int, int]:
    """Return parameters, multiply-adds of 16 pictures, and those when one of them is asked for."""
    config = IciiaConfig(width, CLASSES, LAYERS, groups=groups)
    one = config.multiply_adds_of_one(PICTURES)
    return config.projection_parameters, config.multiply_adds(PICTURES), one


def backbone_cost(name: str, side: int) -> tuple[int, int]:
    """Return parameters and multiply-adds of one picture for an architecture of timm."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, side, side))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def sessions(source: RecognizerSource) -> Mapping[str, Session]:
    """Return the networks of a recogniser as an export writes and a device opens them."""
    opened = {}
    with TemporaryDirectory() as folder:
        for name, _, load in source.parts:
            traced, file = Path(folder, f"{name}.onnx"), Path(folder, name, "model.onnx")
            with quiet():
                load().trace(traced)
            optimise(traced, file)
            opened[name] = Session(file, threads=1, optimized=True)
    return opened


def latency(source: RecognizerSource, rounds: int) -> Mapping[str, np.ndarray]:
    """Return seconds (rounds,) of a picture without and with 15 earlier ones, in alternation."""
    parts, rng = sessions(source), np.random.default_rng(0)
    side = source.model.backbone.side
    picture = rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    backbone, head, adapted = (parts[NAMES[name]] for name in ("backbone", "head", "adapted"))
    before = backbone.run({"pictures": picture.repeat(PICTURES - 1, 0)})[0]

    def plain() -> None:
        head.run({"features": backbone.run({"pictures": picture})[0]})

    def with_history() -> None:
        (own,) = backbone.run({"pictures": picture})
        adapted.run({"before": before, "features": own})

    taken = {"backbone and its head": plain, "backbone and ICIIA": with_history}
    seconds: dict[str, list[float]] = {name: [] for name in taken}
    for _ in range(rounds + 10):
        for name, work in taken.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values[10:]) for name, values in seconds.items()}


def print_latency(folder: Path, rounds: int) -> None:
    """Print what one picture takes on one pinned thread, and what 15 of history add to it."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    source = open_recognizer(folder)
    config = source.model.iciia.config
    seconds = latency(source, rounds)
    (_, plain), (_, more) = seconds.items()
    click.echo(
        f"N = {config.layers}, P = {config.groups}, D = {config.width}, {config.classes} classes"
    )
    for name, values in seconds.items():
        low, half = np.quantile(values, (0.05, 0.5)) * 1e3
        click.echo(f"{name:<24}{half:8.3f} ms median{low:8.3f} ms at best (5 %)")
    for what, q in (("median", 0.5), ("at best", 0.05)):
        click.echo(f"  added, {what}: {np.quantile(more, q) / np.quantile(plain, q) - 1:+.1%}")


@click.command("iciia_cost")
@click.option(
    "--recognizer",
    type=click.Path(path_type=Path, file_okay=False),
    help="Measure the time that ICIIA of this recogniser adds, instead.",
)
@click.option("--rounds", type=click.IntRange(min=20), default=400, show_default=True)
def main(recognizer: Path | None, rounds: int) -> None:
    """Print table 1: ours, and the paper's in brackets; shares are of our own backbone counts.

    "one" is the same answer for a single target, whose last layer leaves the others out.
    """
    if recognizer is not None:
        print_latency(recognizer, rounds)
        return
    click.echo(
        f"{'':<16}{'parameters':>18}{'multiply-adds':>20}{'share':>8}{'one':>10}{'share':>9}"
    )
    for row in TABLE_1:
        parameters, cost = backbone_cost(row.timm_name, row.side)
        click.echo(
            f"{row.name:<16}{_beside(parameters, row.parameters)}{_beside(cost, row.multiply_adds)}"
        )
        for form, groups, paper in (("B", 1, row.b), ("T", tiny_groups(row.width), row.t)):
            more, work, one = added(row.width, groups)
            click.echo(
                f"  ICIIA-{form:<8}{_beside(more, paper[0])}{_beside(work, paper[1])}"
                f"{work / cost:>8.2%}{_short(one):>10}{one / cost:>9.3%}"
            )


def _beside(ours: float, paper: float) -> str:
    return f"{_short(ours):>10}{'(' + _short(paper) + ')':>9}"


def _short(value: float) -> str:
    unit, letter = (1e9, "G") if value >= 1e8 and value >= 1e9 * 0.2 else (1e6, "M")
    return f"{value / unit:.3g}{letter}"


if __name__ == "__main__":
    main()
