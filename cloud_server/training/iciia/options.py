"""What both commands about recognisers are told, as their options: pictures, sizes, training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloud_server.console import debug_option, device_option, threads_option

if TYPE_CHECKING:
    from cloud_server.training.iciia.learn import Optimizer, Schedule
    from cloud_server.training.iciia.module import IciiaConfig

_FOLDER = click.Path(path_type=Path, file_okay=False)
_OPTIONS = (
    click.argument("source", metavar="emoji|omniglot|MANIFEST"),
    click.option(
        "--omniglot",
        type=_FOLDER,
        default=Path("omniglot"),
        show_default=True,
        help="Folder of Omniglot's images_background_small1.zip and 2.",
    ),
    click.option(
        "--clients",
        help="Who counts as a client: subgroup or random for emoji, alphabet or drawer for "
        "omniglot; default: the first. A manifest says it itself.",
    ),
    click.option(
        "--work",
        type=_FOLDER,
        default=Path("train/recognizer"),
        show_default=True,
        help="Folder of checkpoints and cached features; a killed run resumes from it.",
    ),
    click.option(
        "--layers", type=click.IntRange(1, 12), default=2, show_default=True, help="N of ICIIA."
    ),
    click.option(
        "--groups",
        type=click.IntRange(min=1),
        help="P of ICIIA-T; default: 256, or the most that the backbone's width allows.",
    ),
    click.option(
        "--dropout",
        type=click.FloatRange(0.0, 1.0, max_open=True),
        default=0.1,
        show_default=True,
        help="The paper's; with many pictures and small groups none is better.",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["sgd", "adamw"]),
        default="sgd",
        show_default=True,
        help="The paper's, or one that needs fewer epochs.",
    ),
    click.option(
        "--learning-rate",
        type=click.FloatRange(min=0, min_open=True),
        default=0.01,
        show_default=True,
        help="With sgd that of one client's batch: a step by 16 clients is 16 times as long.",
    ),
    click.option(
        "--clients-at-once",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Whose batches make one step, side by side.",
    ),
    click.option(
        "--epochs",
        type=click.IntRange(min=1),
        default=100,
        show_default=True,
        help="With sgd at most: ten without a gain end it before.",
    ),
    click.option(
        "--learn-head",
        is_flag=True,
        help="Train the backbone's head on with the module, as the paper does: better with many "
        "pictures; with few it overfits.",
    ),
    click.option(
        "--strangers",
        type=click.FloatRange(0.0, 1.0),
        default=0.25,
        show_default=True,
        help="Share of pictures that are learnt among those of all clients, so that the module "
        "does not believe every history; the paper's is 0.",
    ),
    device_option,
    threads_option,
    debug_option,
)


@dataclass(frozen=True, slots=True)
class Setup:
    """The options that `setup_options` adds to a command, as they were given."""

    source: str
    omniglot: Path
    clients: str | None
    work: Path
    layers: int
    groups: int | None
    dropout: float
    optimizer: Optimizer
    learning_rate: float
    clients_at_once: int
    epochs: int
    learn_head: bool
    strangers: float
    device: str
    threads: int | None
    debug: bool

    def schedule(self) -> Schedule:
        """Return how to train."""
        from cloud_server.training.iciia.learn import Schedule

        return Schedule(
            self.optimizer,
            self.learning_rate,
            self.clients_at_once,
            epochs=self.epochs,
            learn_head=self.learn_head,
            strangers=self.strangers,
        )

    def tiny(self, width: int, classes: int) -> IciiaConfig:
        """Return the sizes of ICIIA-T on features of `width`.

        Raises ConfigError when heads or groups do not divide it.
        """
        from cloud_server.training.iciia.module import IciiaConfig, tiny_groups

        groups = self.groups or tiny_groups(width)
        return IciiaConfig(width, classes, self.layers, groups=groups, dropout=self.dropout)

    def open_device(self) -> str:
        """Return where to train, and let torch have as many threads as were given.

        Raises ModelError for a device that is not here.
        """
        import torch

        from cloud_server.engine import pick_device

        if self.threads:
            torch.set_num_threads(self.threads)
        return pick_device(self.device)


def setup_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command the options of a Setup, which it gets as `setup`."""

    @wraps(command)
    def with_setup(**given: Any) -> Any:
        setup = Setup(**{field.name: given.pop(field.name) for field in fields(Setup)})
        return command(setup=setup, **given)

    for add in reversed(_OPTIONS):
        with_setup = add(with_setup)
    return with_setup
