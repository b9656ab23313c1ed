"""What the commands share: how errors of ours end, and how a device is written."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

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
            f"the server needs the package {error.name!r}, which is not installed; run "
            "pip install -c constraints.txt 'routet2i-edge[cloud]'"
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
