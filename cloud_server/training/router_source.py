"""What a router is learnt from or measured on, as options of a command: labels, or a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloud_server.errors import ConfigError, ModelError
from cloud_server.starter import starter_folder

if TYPE_CHECKING:
    from cloud_server.training.router_folder import Material

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
_OPTIONS = (
    click.option(
        "--labels",
        type=_FILE,
        multiple=True,
        help="What cloud-server label wrote; may be repeated for more prompts of the same pair.",
    ),
    click.option(
        "--scores",
        type=_FILE,
        help="Or a CSV table of ratings: prompt, model, metric and score, from 0 to 1.",
    ),
    click.option("--edge-model", help="The model of --scores that draws on the device."),
    click.option("--cloud-model", help="The model of --scores that draws in the cloud."),
    click.option(
        "--metric", "metrics", multiple=True, help="A metric of --scores; may be repeated.  [all]"
    ),
    click.option(
        "--text-encoder",
        metavar="ID_OR_DIR",
        help="What reads prompts, in Hugging Face or open_clip format.  [the starter models']",
    ),
)


@dataclass(frozen=True, slots=True)
class Source:
    """The options that `source_options` adds to a command, as they were given."""

    labels: tuple[Path, ...]
    scores: Path | None
    edge_model: str | None
    cloud_model: str | None
    metrics: tuple[str, ...]
    text_encoder: str | None

    def encoder(self) -> str | Path:
        """Return where the text encoder is that reads prompts; raises ModelError."""
        if self.text_encoder:
            return self.text_encoder
        try:
            return starter_folder() / "edge"
        except FileNotFoundError as error:
            raise ModelError(f"{error}, or pass --text-encoder") from error

    def material(self, calibration: Path | None = None) -> Material:
        """Read labels, or two models of a table of scores, and more prompts from `calibration`.

        Raises ConfigError unless exactly one of the two is named, and DataError for bad files.
        """
        from cloud_server.training.labels import read_for_training, read_prompts
        from cloud_server.training.router_folder import Material

        if bool(self.labels) == bool(self.scores):
            raise ConfigError("give either --labels FILE or --scores FILE")
        fresh = read_prompts(calibration) if calibration else []
        if self.labels:
            if self.edge_model or self.cloud_model or self.metrics:
                raise ConfigError(
                    "--edge-model, --cloud-model and --metric choose from --scores; labels are of "
                    "one pair already"
                )
            return _fresh_only(Material(read_for_training(*self.labels), fresh))
        assert self.scores is not None
        if not (self.edge_model and self.cloud_model):
            raise ConfigError("--scores needs --edge-model and --cloud-model, two of its models")

        from cloud_server.training.scores import read_scores

        scores = read_scores(self.scores)
        pair = scores.pair(self.edge_model, self.cloud_model, self.metrics)
        if left_out := len(scores.prompts) - len(pair.prompts):
            name, rated = scores.seldom_rated(pair, self.edge_model, self.cloud_model)
            click.echo(
                f"{left_out} of {len(scores.prompts)} prompts lack a rating of {self.edge_model} "
                f"or {self.cloud_model} and are left out; on {name} both are rated for {rated}"
                + (", choose others with --metric" if len(pair.metrics) > 1 else ""),
                err=True,
            )
        return _fresh_only(
            Material(pair, fresh, scores.related(pair, self.edge_model, self.cloud_model))
        )


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command the options of a Source, which it gets as `source`."""

    @wraps(command)
    def with_source(**given: Any) -> Any:
        source = Source(**{field.name: given.pop(field.name) for field in fields(Source)})
        return command(source=source, **given)

    for add in reversed(_OPTIONS):
        with_source = add(with_source)
    return with_source


def _fresh_only(material: Material) -> Material:
    """Drop calibration prompts that are labelled: the predictor may know their answers."""
    known = set(material.labels.prompts)
    fresh = [prompt for prompt in material.calibration if prompt not in known]
    if material.calibration and not fresh:
        raise ConfigError(
            "every prompt of --calibration is labelled already; pass others, or leave it out"
        )
    return replace(material, calibration=fresh)
