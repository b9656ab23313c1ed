"""The command `cloud-server`: serve the large model, and train what the project ships."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from cloud_server import config
from cloud_server.console import Device, one_sentence
from cloud_server.errors import ConfigError, ModelError

# Training imports torch; each command is found when it is called for, its summary stands here.
_LAZY = {
    "evaluate-router": (
        "cloud_server.training.evaluation.cli:evaluate_router_command",
        "Measure a router beside simpler ways to choose.",
    ),
    "evaluate-recognizer": (
        "cloud_server.training.iciia.cli:evaluate_recognizer",
        "Measure ICIIA beside its baselines and ablations.",
    ),
    "train-recognizer": (
        "cloud_server.training.iciia.cli:train_recognizer",
        "Train recognition that adapts to its owner (ICIIA).",
    ),
    "evaluate-starter": (
        "cloud_server.training.starter.cli:evaluate_starter",
        "Measure the starter models on fresh scenes.",
    ),
    "label": (
        "cloud_server.training.labels.cli:label_command",
        "Draw prompts with two models and score every picture.",
    ),
    "train-router": (
        "cloud_server.training.router_cli:train_router_command",
        "Learn from labels or ratings which prompts gain by the cloud.",
    ),
    "train-starter": (
        "cloud_server.training.starter.cli:train_starter",
        "Train the starter models from nothing.",
    ),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_LAZY})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LAZY:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = _LAZY[cmd_name][0].partition(":")
        with one_sentence():  # what it imports may not be installed
            command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            own = self.commands.get(name)
            rows.append((name, own.get_short_help_str(80) if own else _LAZY[name][1]))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="routet2i-edge", prog_name="cloud-server")
@click.pass_context
def main(ctx: click.Context) -> None:
    """The large text-to-image model behind gRPC, and all training."""
    if ctx.invoked_subcommand == "serve":
        known = [parameter.name for parameter in serve.params if parameter.name]
        with one_sentence():
            file = config.config_path()
            settings = config.read_config(file, known)
            _check(file, settings)
            ctx.default_map = {"serve": settings}


def _check(file: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the file, for a value that the flag would not take."""
    for parameter in serve.params:
        if parameter.name in settings:
            try:
                parameter.type.convert(settings[parameter.name], parameter, None)
            except click.BadParameter as error:
                raise ConfigError(f"{file}, {parameter.name}: {error.message}") from error


def _end_while_loading(code: int) -> None:
    """End the process at once if its model is still loading; Python would wait for that."""
    from cloud_server.studio import ENGINE_THREAD

    for thread in threading.enumerate():
        if thread.name.startswith(ENGINE_THREAD):
            thread.join(1.0)
            if thread.is_alive():
                logging.getLogger(__name__).info("ended before the model was loaded")
                logging.shutdown()
                sys.stdout.flush()
                os._exit(code)


def _option(name: str, help_text: str, **settings: Any) -> Callable[[Any], Any]:
    variable = "CLOUD_SERVER_" + name.removeprefix("--").upper()
    return click.option(
        name, help=help_text, envvar=variable, show_envvar=True, show_default=True, **settings
    )


@main.command()
@_option("--model", "Diffusers folder or hub id.  [default: the starter cloud model]")
@_option("--address", "HOST:PORT to listen on; port 0 takes a free one.", default="127.0.0.1:50051")
@_option("--insecure", "Allow an address that others can reach.", is_flag=True)
@_option("--reflection", "Answer gRPC reflection.", is_flag=True)
@_option(
    "--grace",
    "Seconds that accepted pictures get on SIGTERM.",
    type=click.FloatRange(min=0, max=86_400),
    default=30.0,
)
@_option("--queue", "Pictures that may wait.", type=click.IntRange(min=0), default=8)
@_option("--threads", "CPU threads of the model.  [default: torch's]", type=click.IntRange(min=1))
@_option("--device", "auto, cpu, cuda or cuda:N.", type=Device(), default="auto")
@_option("--debug", "Log more, and show tracebacks.", is_flag=True)
def serve(
    model: str | None,
    address: str,
    insecure: bool,
    reflection: bool,
    grace: float,
    queue: int,
    threads: int | None,
    device: str,
    debug: bool,
) -> None:
    """Serve the large model over gRPC until SIGTERM."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    with one_sentence(debug=debug):
        listen = config.listen_address(address, insecure=insecure)
        from cloud_server import engine, server

        source = model or _starter()
        engine.check_model(source)
        settings = config.ServeSettings(
            source, listen, insecure, reflection, grace, queue, threads, device
        )
        if not listen.loopback:
            logging.getLogger(__name__).warning("anyone who reaches %s can draw here", listen)
        received = asyncio.run(
            server.run(
                settings,
                lambda: engine.DiffusersEngine.load(source, device=device, threads=threads),
                click.echo,
            )
        )
    code = 130 if received is signal.SIGINT else 0
    _end_while_loading(code)
    sys.exit(code)


def _starter() -> str:
    from cloud_server.starter import starter_folder

    try:
        return str(starter_folder() / "cloud")
    except FileNotFoundError as error:
        raise ModelError(str(error)) from error
