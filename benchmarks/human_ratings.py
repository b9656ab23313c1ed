"""`python -m benchmarks.human_ratings`: our router on ratings that people gave real models.

Runs `cloud-server evaluate-router` on six pairs of models and prints the APGR of every way to
choose, pair by pair and in the mean, with how much better ours is. The interval of that mean takes
pairs of one table, which share prompts, as fully correlated, and tables as independent.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import click

PAIRS = (  # table, metric, edge, cloud
    ("genaibench527", "human_alignment", "SDXL_Turbo", "DALLE_3"),
    ("genaibench527", "human_alignment", "SDXL_Turbo", "Midjourney_6"),
    ("agiqa3k", "human_quality", "sd1.5_normal", "midjourney_normal"),
    ("agiqa3k", "human_alignment", "sd1.5_normal", "xl2.2_normal"),
    ("tifa160", "human_alignment_tifa", "VQ-Diffusion", "SD_2_1"),
    ("tifa160", "human_alignment_tifa", "SD_1_1", "SD_2_1"),
)


@click.command()
@click.argument("tables", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--text-encoder", required=True, metavar="ID_OR_DIR", help="As in evaluate-router.")
@click.option("--predictor", default="linear", show_default=True, help="As in evaluate-router.")
@click.option("--repeats", default=5, show_default=True, help="Of five folds.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("train/human-ratings"),
    show_default=True,
    help="Where each pair's JSON lies; a pair that is there is not run again.",
)
def main(tables: Path, text_encoder: str, predictor: str, repeats: int, work: Path) -> None:
    """Evaluate on six pairs of the CSV tables in the folder TABLES."""
    work.mkdir(parents=True, exist_ok=True)
    reports = []
    for number, (table, metric, edge, cloud) in enumerate(PAIRS, 1):
        file = work / f"{predictor}-{repeats}-{number}.json"
        if not file.exists():
            command: list[str | Path] = [
                sys.executable, "-m", "cloud_server", "evaluate-router",
                "--scores", tables / f"{table}.csv", "--metric", metric,
                "--edge-model", edge, "--cloud-model", cloud,
                "--text-encoder", text_encoder, "--predictor", predictor,
                "--repeats", str(repeats), "--work", work / "state", "--json", file,
            ]  # fmt: skip
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        reports.append(json.loads(file.read_text(encoding="utf-8")))
    for number, (table, metric, edge, cloud) in enumerate(PAIRS, 1):
        click.echo(f"{number}: {table}, {metric}, {edge} against {cloud}")
    click.echo(f"\n| way to choose | {' | '.join('123456')} | mean | ours more (95 %) |")
    click.echo("| --- " * 9 + "|")
    for rows in sorted(_by_way(reports), key=lambda rows: -_mean(rows)):
        cells = [f"{row['numbers']['apgr']['mean']:.3f}" for row in rows]
        click.echo(
            f"| {rows[0]['name']} | {' | '.join(cells)} | {_mean(rows):.3f} | {_ours_more(rows)} |"
        )


def _by_way(reports: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return for each way to choose its row in every report; ways that some lack are left out."""
    rows = [{method["key"]: method for method in report["methods"]} for report in reports]
    return [[of[key] for of in rows] for key in rows[0] if all(key in of for of in rows)]


def _mean(rows: list[dict[str, Any]]) -> float:
    return sum(row["numbers"]["apgr"]["mean"] for row in rows) / len(rows)


def _ours_more(rows: list[dict[str, Any]]) -> str:
    more = [row["ours_more"]["apgr"] for row in rows]
    if rows[0]["key"] == "ours":
        return ""
    variance = 0.0
    for _, of_table in groupby(zip(PAIRS, more, strict=True), key=lambda pair: pair[0][0]):
        spreads = [(one["high"] - one["low"]) / (2 * 1.96) for _, one in of_table]
        variance += sum(spreads) ** 2
    mean = sum(one["mean"] for one in more) / len(more)
    reach = 1.96 * math.sqrt(variance) / len(more)
    return f"{mean:+.3f} ({mean - reach:+.3f} to {mean + reach:+.3f})"


if __name__ == "__main__":
    main()
