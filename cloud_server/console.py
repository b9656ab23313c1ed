"""What the commands share: options, how errors of ours end, and how a command was given."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cloud_server.errors import ConfigError, ServerError

DEVICES = ("auto", "cpu", "cuda", "cuda:N")


class Device(click.ParamType):
    """auto, cpu, cuda or cuda:N."""

    name = "device"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the value if it is one of them."""
        kind, colon, number = str(value).partition(":")
        known = (
            kind in ("auto", "cpu", "cuda") if not colon else kind == "cuda" and number.isdigit()
        )
        if not known:
            self.fail(f"{value!r} is none of {', '.join(DEVICES)}", param, ctx)
        return str(value)


device_option = click.option(
    "--device", type=Device(), default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores."
)
debug_option = click.option("--debug", is_flag=True, help="Show the whole traceback of an error.")


def given_command() -> str:
    """Return the command that is running, with the options as they were given."""
    context = click.get_current_context()
    words = ["cloud-server", str(context.command.name)]
    for option in context.command.params:
        name = str(option.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        flag = [] if isinstance(option, click.Argument) else [option.opts[-1]]
        if isinstance(value, bool):
            words.append(option.opts[0] if value else option.secondary_opts[0])
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [*flag, shlex.quote(str(one))]
    return " ".join(words)


@contextmanager
def one_sentence(*, debug: bool = False) -> Iterator[None]:
    """Turn our errors into one sentence on stderr and the exit code that belongs to it."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if debug:
            raise
        raise click.ClickException(
            f"this command needs the package {error.name!r}, which is not installed; in a clone "
            "of the project run pip install -c constraints.txt '.[cloud]'"
        ) from error
    except OSError as error:
        if debug or error.filename is None:
            raise
        name = os.fsdecode(error.filename)
        raise click.ClickException(
            f"{name} cannot be used ({error.strerror}); name another file or folder"
        ) from error
    except ServerError as error:
        if debug:
            raise
        wrong_usage = isinstance(error, ConfigError)
        kind = click.UsageError if wrong_usage else click.ClickException
        raise kind(str(error)) from error


def check_writable(*folders: Path) -> None:
    """Raise ConfigError where nothing can be written in a folder, there or yet to be made.

    For commands that write at the end of long work.
    """
    for folder in folders:
        there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            raise ConfigError(
                f"nothing can be written in the folder {folder} ({error.strerror}); name another"
            ) from error
