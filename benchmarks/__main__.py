"""`python -m benchmarks`: the speeds that the device is held to, beside peers in the same run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from benchmarks.weight import BASE_LIMIT, weigh
from cloud_server.starter import starter_folder
from edge_agent import EdgeAgent, Request, Route, open_bundle
from export.quiet import quiet

ROOT = Path(__file__).parent.parent
PROMPTS = (
    "a cat",
    "a red car on the beach",
    "two yellow balloons under a blue sky",
    "a dog to the left of a house on grass",
    "two red apples to the left of a cat and a house at night",
)
PACKAGES = ("numpy", "onnxruntime", "torch", "diffusers", "transformers")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; times in milliseconds."""

    what: str
    value: str
    bar: str
    peer: str = ""


@dataclass(frozen=True, slots=True)
class Times:
    """Repeated timings of one thing, in milliseconds."""

    p50: float
    p95: float
    count: int

    def __str__(self) -> str:
        return f"p50 {self.p50:.1f} ms, p95 {self.p95:.1f} ms (n={self.count})"


@click.command("benchmarks")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "demo" / "bundle",
    help="Bundle to measure; exported first if missing.  [default: demo/bundle]",
)
@click.option(
    "--starter",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Starter models that the bundle was made of; default: those shipped.",
)
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
@click.option("--install", is_flag=True, help="Also measure the base install (some minutes).")
def main(bundle: Path, starter: Path | None, threads: int, install: bool) -> None:
    """Print the device's speeds beside PyTorch's."""
    starter = starter or starter_folder()
    if not (bundle / "bundle.json").is_file():
        command = [sys.executable, "-m", "export", "--starter", str(starter), "-o", str(bundle)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    _print_conditions(threads)
    with EdgeAgent(open_bundle(bundle), offline=True, threads=threads) as agent:
        agent.open()
        rows = [
            _cold(bundle),
            _decision(agent, starter, threads),
            _picture(agent, starter, threads),
        ]
    rows += _full_size(threads)
    if install:
        rows.append(_install())
    lines = [(row.what, row.value, row.bar, row.peer) for row in rows]
    print_columns([("what", "measured", "to reach", "beside it"), *lines])


def timed(work: Callable[[int], object], count: int, what: str, warm_up: int = 3) -> Times:
    """Time `work(i)` for i below `count`, after `warm_up` runs that do not count."""
    for index in range(warm_up):
        work(index)
    taken = []
    for index in tqdm(range(count), desc=what, leave=False, disable=None):
        begun = time.perf_counter()
        work(index)
        taken.append(1e3 * (time.perf_counter() - begun))
    p50, p95 = np.percentile(taken, (50, 95))
    return Times(float(p50), float(p95), count)


def _cold(bundle: Path) -> Row:
    def run(*program: str) -> Callable[[int], object]:
        command = [sys.executable, *program]
        return lambda _: subprocess.run(command, check=True, capture_output=True)

    route = run("-m", "edge_agent", "route", "--json", "--bundle", str(bundle), PROMPTS[0])
    ours = timed(route, 10, "cold route", warm_up=1)
    bare = timed(run("-c", "import numpy, onnxruntime"), 10, "bare imports", warm_up=1)
    torch = timed(run("-c", "import torch"), 5, "import torch", warm_up=1)
    return Row(
        "edge-agent route, from process start",
        str(ours),
        "600 ms",
        f"import numpy, onnxruntime {bare.p50:.0f} ms; import torch {torch.p50:.0f} ms",
    )


def _decision(agent: EdgeAgent, starter: Path, threads: int) -> Row:
    ours = timed(lambda i: agent.route(PROMPTS[i % len(PROMPTS)]), 300, "decision", warm_up=20)

    import torch

    from cloud_server.torchvision_guard import guard

    guard()
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.set_num_threads(threads)
    with quiet():
        tokenizer = CLIPTokenizer.from_pretrained(starter / "edge" / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(starter / "edge" / "text_encoder").eval()

    @torch.inference_mode()
    def encode(index: int) -> object:
        words = tokenizer(
            PROMPTS[index % len(PROMPTS)],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return encoder(words.input_ids).last_hidden_state

    peer = timed(encode, 100, "torch encoder", warm_up=10)
    return Row("decision, warm", str(ours), "p50 5 ms", _ratio("text encoder alone", peer, ours))


def _full_size(threads: int) -> list[Row]:
    from benchmarks.decision import VIT_L_14, decisions, sizes_of
    from cloud_server.training.predictor import KINDS, build

    words = [len(prompt.split()) for prompt in PROMPTS]
    bars = {"fp32": ("", ""), "int8": ("p50 30 ms", "paper: 64.5 ms")}
    for kind in KINDS:
        size = build(sizes_of(kind, VIT_L_14["hidden_size"]))
        parameters = sum(weight.numel() for weight in size.parameters())
        bars[kind] = ("1 ms", f"{parameters / 1e6:.1f} M parameters, of at most 10 M")
    with decisions(VIT_L_14, words, threads) as all_of_them:
        return [
            Row(f"ViT-L/14: {name}", str(timed(work, 100, name, 10)), *bars[name.split()[0]])
            for name, work in all_of_them.items()
        ]


def _picture(agent: EdgeAgent, starter: Path, threads: int) -> Row:
    def draw(index: int) -> object:
        request = Request(PROMPTS[index % len(PROMPTS)], seed=index, route=Route.EDGE)
        return agent.generate(request).picture

    ours = timed(draw, 20, "edge picture")
    shown = agent.generate(Request(PROMPTS[0], seed=0, route=Route.EDGE)).picture

    import torch

    from cloud_server.torchvision_guard import guard

    guard()
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(threads)
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(starter / "edge")
    pipeline.set_progress_bar_config(disable=True)

    def draw_in_torch(index: int) -> object:
        return pipeline(
            PROMPTS[index % len(PROMPTS)],
            width=shown.width,
            height=shown.height,
            num_inference_steps=shown.steps,
            guidance_scale=shown.guidance,
            generator=torch.Generator().manual_seed(index),
        ).images[0]

    peer = timed(draw_in_torch, 20, "diffusers picture")
    what = f"edge picture {shown.width}x{shown.height}, {shown.steps} steps, warm, all included"
    return Row(what, str(ours), "400 ms", _ratio("diffusers", peer, ours))


def _ratio(name: str, peer: Times, ours: Times) -> str:
    return f"{name} in PyTorch p50 {peer.p50:.1f} ms: {peer.p50 / ours.p50:.2f} times ours"


def _install() -> Row:
    """Install the base from a wheel into a clean environment and weigh it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _quietly(sys.executable, "-m", "build", "--wheel", "-o", folder, ROOT)
        (wheel,) = folder.glob("*.whl")
        environment = folder / "venv"
        _quietly(sys.executable, "-m", "venv", environment)
        fresh = weigh(environment)
        pip = (environment / "bin" / "python", "-m", "pip", "install")
        _quietly(*pip, "-c", ROOT / "constraints.txt", wheel)
        total = weigh(environment)
    return Row(
        "base install",
        f"{total - fresh:.1f} MB on disk",
        f"{BASE_LIMIT} MB",
        f"with what a fresh environment holds, pip in it: {total:.1f} MB",
    )


def _quietly(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def _print_conditions(threads: int) -> None:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    click.echo(f"python -m benchmarks {' '.join(sys.argv[1:])}".rstrip())
    click.echo(f"{processor()}, {os.cpu_count()} cores, {threads} threads, load average {load}")
    click.echo(f"Python {platform.python_version()}, {versions}\n")


def processor() -> str:
    """Return the processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def print_columns(rows: Iterable[Sequence[str]], right: Container[int] = ()) -> None:
    """Print rows, the first of which is the heading, with the columns in `right` flush right."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        click.echo("  ".join(padded).rstrip())


if __name__ == "__main__":
    main()
