"""`python -m benchmarks.edge_vs_peers`: the device beside what people would otherwise install.

Pipelines of the sizes people use are made with random weights, exported with our own export, and
drawn by everybody in processes of their own, one after the other. What was made and what was
measured is kept under --work: a run that was stopped goes on there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.__main__ import print_columns, processor
from benchmarks.peers.prepare import (
    BUNDLES,
    PARTS,
    ROOT,
    TEXT,
    prepare,
    prepare_starter,
    prepare_text,
)

PACKAGES = ("numpy", "onnxruntime", "openvino", "torch", "diffusers", "optimum-onnx")
OPTIONAL = {"openvino": "openvino", "stable-diffusion.cpp": "stable_diffusion_cpp"}
PEERS = ("diffusers-fp32", "diffusers-bf16", "optimum", "openvino", "stable-diffusion.cpp")
OWN_NOISE = ("stable-diffusion.cpp",)  # whose pictures no other's can be compared with
NEEDS = {"optimum": ("optimum",), "openvino": ("bundle", "optimum")}
STARTED = ("ours", "diffusers-fp32")  # whose starts are compared; contenders begin with these
LOW, W8A8 = "memory=low", f"bundle={BUNDLES[1]}"
# How a process is asked for each of its starts: to draw one picture, or to open everything.
STARTS: dict[str, dict[str, Any]] = {"first_s": {"repeats": 0}, "ready_s": {"ready": True}}
LIMIT_S = 600
QUIET_LOAD = 0.5


@dataclass(frozen=True, slots=True)
class Case:
    """Something that several contenders do, and how often.

    `cold` more processes draw their first picture and nothing else, and as many open everything and
    draw nothing, for the medians of their starts.
    Without `steps` it is the pipeline's own number of them; the first picture may have fewer.
    """

    name: str
    title: str
    contenders: tuple[str, ...]
    steps: int
    warm_up_steps: int
    repeats: int
    cold: int = 0


@dataclass(frozen=True, slots=True)
class Bar:
    """What is to be reached: a quantity of ours over a peer's."""

    case: str
    what: str  # p50_s, first_s, ready_s or peak_rss_mb
    peer: str
    most: float | None
    ours: str = "ours"  # in the contender's name; of several the best counts
    enough: float | None = None  # of the quantity itself, which will do as well


BARS = (
    Bar("sd-turbo", "p50_s", "diffusers-fp32", 0.30),
    Bar("sd-turbo", "p50_s", "diffusers-bf16", 0.55),
    Bar("sd-turbo", "p50_s", "optimum", 0.5),
    Bar("sd-turbo", "p50_s", "openvino", 1.0),
    Bar("tiny-sd", "p50_s", "diffusers-fp32", 0.30),
    Bar("tiny-sd", "p50_s", "diffusers-bf16", 0.55),
    Bar("tiny-sd", "p50_s", "optimum", 0.5),
    Bar("tiny-sd", "p50_s", "openvino", 1.0),
    Bar(TEXT, "p50_s", "torch-fp32", 0.2, ours="onnxruntime-int8", enough=0.020),
    Bar("sd-turbo", "first_s", "diffusers-fp32", 0.5),
    Bar("sd-turbo", "ready_s", "diffusers-fp32", None, enough=2.0),
    Bar("sd-turbo", "peak_rss_mb", "diffusers-fp32", 0.75, ours=LOW),
    Bar("starter", "p50_s", "diffusers-fp32", 0.5),
)
WORDS = {
    "p50_s": "median",
    "first_s": "process start to picture",
    "ready_s": "process start to all open",
    "peak_rss_mb": "peak RSS",
}


@click.command("edge_vs_peers")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/peers"),
    show_default=True,
    help="Where models, exports and measurements are kept; about 30 GB.",
)
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
@click.option(
    "--ours",
    multiple=True,
    metavar="SETTINGS",
    help="Our settings, as in 'provider=cpu memory=low bundle=bundle-w8a8'; several times.",
)
@click.option("--only", multiple=True, help="A case or a contender; several times.")
@click.option("--repeats", type=click.IntRange(min=1), help="Instead of each case's own.")
@click.option("--prepare", "only_prepare", is_flag=True, help="Make models and exports, then stop.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option("--quick", is_flag=True, help="Small models, to try this program out.")
@click.option(
    "--json", "as_json", type=click.Path(path_type=Path), help="Write all that was found."
)
def main(
    work: Path,
    threads: int,
    ours: tuple[str, ...],
    only: tuple[str, ...],
    repeats: int | None,
    only_prepare: bool,
    fresh: bool,
    quick: bool,
    as_json: Path | None,
) -> None:
    """Print the device's times, memory and start beside its peers', and what is to be reached."""
    work = work.resolve() / ("quick" if quick else "full")
    wanted = list(_wanted(_cases(quick, ours), only))
    for case in wanted:
        _prepare(case, work, quick)
    if only_prepare:
        click.echo(work)
        return
    conditions = _conditions(threads)
    click.echo("\n".join(conditions) + "\n")
    if os.getloadavg()[0] > QUIET_LOAD:
        click.echo("the machine is busy: times below are no comparison\n")
    found: dict[str, dict[str, Any]] = {}
    for case in wanted:
        found[case.name] = _measured(case, work, threads, repeats, fresh)
    print_columns(_rows(wanted, found), right=range(2, 9))
    click.echo()
    print_columns(_reached(found))
    if as_json:
        as_json.write_text(
            json.dumps({"conditions": conditions, "quick": quick, "found": found}, indent=1),
            encoding="utf-8",
        )


def _cases(quick: bool, ours: Iterable[str]) -> list[Case]:
    own = tuple(f"ours {each}".strip() for each in ours or _own_settings())
    kept_open = tuple(each for each in own if LOW not in each) or own
    peers = [each for each in PEERS if _installed(each)]
    few = 1 if quick else 3
    return [
        Case("sd-turbo", "SD-Turbo size, 1 step", (*own, *peers), 1, 1, 2 if quick else 5, few),
        Case(
            "tiny-sd",
            "tiny-sd size, 8 steps, guided",
            (*kept_open, *peers),
            2 if quick else 8,
            1,
            few,
        ),
        Case(TEXT, "CLIP ViT-L/14 text", ("onnxruntime-int8", "torch-fp32"), 1, 1, 50),
        Case(
            "starter", "starter picture", (*kept_open, "diffusers-fp32"), 0, 0, 2 if quick else 20
        ),
    ]


def _own_settings() -> list[str]:
    """Return what of ours is worth measuring here: providers, 8 bits, and the least memory."""
    # In 8 bits each network goes to the engine that it is made for.
    openvino = ["provider=openvino", W8A8] if _installed("openvino") else []
    return ["provider=cpu", *openvino, f"provider=cpu {LOW}"]


def _installed(peer: str) -> bool:
    return peer not in OPTIONAL or importlib.util.find_spec(OPTIONAL[peer]) is not None


def _wanted(cases: Iterable[Case], only: tuple[str, ...]) -> Iterator[Case]:
    """Yield what `--only` leaves: cases by name, and contenders by name or setting."""
    cases = list(cases)
    names = {case.name for case in cases} & set(only)
    peers = set(only) - names
    known = {contender for case in cases for contender in case.contenders}
    if peers - known:
        raise click.UsageError(
            f"--only {sorted(peers - known)[0]!r} is neither a case nor a contender; choose of "
            f"{', '.join([*(case.name for case in cases), *sorted(known)])}"
        )
    for case in cases:
        contenders = tuple(each for each in case.contenders if not peers or each in peers)
        if contenders and (not names or case.name in names):
            yield replace(case, contenders=contenders)


def _prepare(case: Case, work: Path, quick: bool) -> None:
    needed = {"model", "bundle"} | {part for each in case.contenders for part in _needs(each)}
    if case.name == TEXT:
        prepare_text(work, quick)
    elif case.name == "starter":
        prepare_starter(work, needed)
    else:
        prepare(case.name, work, quick, tuple(part for part in PARTS if part in needed))


def _needs(contender: str) -> tuple[str, ...]:
    return (BUNDLES[1],) if W8A8 in contender else NEEDS.get(contender, ())


def _measured(
    case: Case, work: Path, threads: int, repeats: int | None, fresh: bool
) -> dict[str, Any]:
    """Measure every contender, or read what was measured before; what fails is told and kept out.

    Contenders take turns with nobody: each has the machine for itself.
    """
    results = work / "results"
    results.mkdir(parents=True, exist_ok=True)
    found = {}
    for contender in case.contenders:
        file = _file(results, case, contender)
        if fresh or not file.is_file():
            click.echo(f"{case.name}: {contender}", err=True)
            wanted = _task(case, work / case.name, contender, threads, repeats)
            first = _run(wanted, file)
            if first is None:
                continue
            # The first process may have read files from the disk, and compiled what it keeps.
            starts = case.cold if contender.startswith(STARTED) else 0
            for what, how in STARTS.items():
                cold = [_run(wanted | how, file) for _ in range(starts)]
                known = [each[what] for each in cold if each is not None]
                first[what] = float(np.median(known)) if known else None
            first["load"] = os.getloadavg()[0]
            file.write_text(json.dumps(first), encoding="utf-8")
        found[contender] = _summary(json.loads(file.read_text(encoding="utf-8")))
    for contender, its in found.items():  # now that the picture to compare with is there
        file = _file(results, case, contender)
        its["psnr_db"] = None if contender in OWN_NOISE else _near(results, case.name, file)
    return found


def _file(results: Path, case: Case, contender: str) -> Path:
    return results / f"{case.name}--{contender.replace(' ', '-').replace('=', '-')}.json"


def _task(
    case: Case, home: Path, contender: str, threads: int, repeats: int | None
) -> dict[str, Any]:
    steps = case.steps
    if not steps:
        steps = json.loads((home / "model" / "defaults.json").read_text())["steps"]
    return {
        "contender": contender,
        "home": str(home),
        "threads": threads,
        "steps": steps,
        "warm_up_steps": case.warm_up_steps or steps,
        "repeats": repeats or case.repeats,
    }


def _run(wanted: Mapping[str, Any], out: Path) -> dict[str, Any] | None:
    """Measure in a process of its own; return None, and say why, when it fails."""
    partial = out.with_suffix(".partial.json")
    started = json.dumps({**wanted, "started": time.monotonic()})
    command = [sys.executable, "-m", "benchmarks.peers.measure", started, str(partial)]
    threads = {"OMP_NUM_THREADS": str(wanted["threads"]), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | threads,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        click.echo(f"  took longer than {LIMIT_S} s", err=True)
        return None
    if done.returncode:
        click.echo(f"  failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}", err=True)
        return None
    if wanted["repeats"] and not wanted.get("ready"):
        partial.with_suffix(".npy").replace(out.with_suffix(".npy"))
    found = dict(json.loads(partial.read_text(encoding="utf-8")))
    for left in (partial, partial.with_suffix(".npy")):
        left.unlink(missing_ok=True)
    return found


def _summary(raw: Mapping[str, Any]) -> dict[str, Any]:
    p50, p95 = np.percentile(raw["times_s"], (50, 95))
    return {**raw, "p50_s": float(p50), "p95_s": float(p95)}


def _near(results: Path, case: str, file: Path) -> float | None:
    """Return how near a picture comes to that of PyTorch in fp32, in dB; None for itself."""
    reference = results / f"{case}--{'torch' if case == TEXT else 'diffusers'}-fp32.npy"
    own = file.with_suffix(".npy")
    if own == reference or not reference.is_file() or not own.is_file():
        return None
    a, b = np.load(own).astype(np.float64), np.load(reference).astype(np.float64)
    if a.shape != b.shape:
        return None
    peak = 255.0 if case != TEXT else np.abs(b).max()
    return float(10 * np.log10(peak**2 / max(np.mean((a - b) ** 2), 1e-12)))


def _rows(
    cases: Iterable[Case], found: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, ...]]:
    yield "case", "who", "median s", "p95 s", "n", "start s", "open s", "peak MB", "dB from fp32"
    for case in cases:
        for who, its in found[case.name].items():
            near = "" if its["psnr_db"] is None else f"{its['psnr_db']:.1f}"
            times = f"{its['p50_s']:.3f}", f"{its['p95_s']:.3f}", str(len(its["times_s"]))
            starts = ("" if its[what] is None else f"{its[what]:.2f}" for what in STARTS)
            rest = *starts, f"{its['peak_rss_mb']:.0f}", near
            yield case.title, who, *times, *rest


def _reached(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    yield "to reach", "ours over", "ratio", "at most", ""
    for bar in BARS:
        known = found.get(bar.case, {})
        known = {name: its for name, its in known.items() if its[bar.what] is not None}
        own = [name for name in known if bar.ours in name]
        # In 8 bits throughout it is another network: with a line of its own.
        for same in ([each for each in own if (W8A8 in each) is w8a8] for w8a8 in (False, True)):
            if not same or bar.peer not in known:
                continue
            best = min(same, key=lambda name: known[name][bar.what])
            taken = known[best][bar.what]
            ratio = taken / known[bar.peer][bar.what]
            done = (bar.most and ratio <= bar.most) or (bar.enough and taken <= bar.enough)
            told = [f"{bar.most:.2f}"] if bar.most else []
            told += [f"{bar.enough:g} s"] if bar.enough else []
            what = f"{bar.case}: {WORDS[bar.what]} of {best!r}"
            yield what, bar.peer, f"{ratio:.2f}", " or ".join(told), "reached" if done else "missed"


def _conditions(threads: int) -> list[str]:
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    versions = [f"{name} {metadata.version(name)}" for name in PACKAGES if _has(name)]
    return [
        f"python -m benchmarks.edge_vs_peers {' '.join(sys.argv[1:])}".rstrip(),
        f"{processor()}, {os.cpu_count()} cores, {threads} threads, load average {load}",
        f"Python {sys.version.split()[0]}, {', '.join(versions)}",
    ]


def _has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
