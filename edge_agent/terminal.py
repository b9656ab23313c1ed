"""What `edge-agent` has to do with its terminal: notes, progress, files by name, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge_agent.config import Settings
from edge_agent.errors import Cancelled, ConfigError
from edge_agent.types import (
    Cancellation,
    Decision,
    Event,
    Fallback,
    Memory,
    OnEvent,
    Preview,
    Queued,
    Result,
    Route,
    Step,
)

if TYPE_CHECKING:
    from edge_agent.agent import EdgeAgent

PROGRAM = "edge-agent"
T = TypeVar("T")


def note(message: str) -> None:
    """Say one sentence to the person, on stderr."""
    click.echo(f"{PROGRAM}: {message}", err=True)


def note_ignored(decision: Decision) -> None:
    """Say it where the prompt was longer than the text encoder reads."""
    if count := decision.ignored_tokens:
        note(f"the prompt is longer than the model reads; its last {count} tokens were ignored")


def note_undecided(decision: Decision) -> None:
    """Say it where the router could not decide."""
    if not decision.metrics:
        note(decision.reason)


def note_unheard(result: Result) -> None:
    """Say it where a negative prompt had no say: guidance is what it speaks through."""
    guidance = result.picture.guidance
    if result.negative_prompt and result.drawn_on is Route.EDGE and guidance <= 1:
        note(f"the negative prompt was ignored: guidance is {guidance:g}, it works only above 1")


def print_json(content: Mapping[str, Any]) -> None:
    """Print one object as one line of stdout."""
    import json

    unicode = getattr(sys.stdout, "encoding", None) in ("utf-8", "UTF-8", None)
    line = json.dumps(content, ensure_ascii=not unicode)
    for end in "\u2028\u2029":  # which some readers take for the end of a line
        line = line.replace(end, f"\\u{ord(end):x}")
    click.echo(line)


def prompts_in(file: str) -> list[str]:
    """Return the lines of a file that are not blank, or of stdin for `-`; raises ConfigError."""
    try:
        if file == "-" and sys.stdin is None:
            raise ConfigError("--file - reads stdin, which is closed; name a file")
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        # Not splitlines(), which takes characters inside a prompt for ends of lines.
        lines = [line.removesuffix("\r") for line in raw.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as err:
        raise ConfigError(f"--file {file} is not UTF-8 ({err.reason}); convert it") from err
    except OSError as err:
        raise ConfigError(f"--file {file} cannot be read ({err.strerror})") from err
    return [line for line in lines if line.strip()]


@contextmanager
def progress(quiet: bool) -> Iterator[OnEvent]:
    """Show steps as a bar on a terminal, and a change of sides as a note."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield lambda event: _tell(event, quiet)
        return
    from tqdm import tqdm

    with tqdm(unit="step", leave=False, file=sys.stderr) as bar:

        def on_event(event: Event) -> None:
            if isinstance(event, Step):
                bar.set_description(None, refresh=False)
                bar.total = event.total
                bar.update(event.index - bar.n)
            elif isinstance(event, Queued):
                bar.set_description(f"{event.position} ahead in the cloud")
            elif isinstance(event, Fallback):
                bar.set_description(None, refresh=False)
                bar.reset()
                bar.clear()
                _tell(event, quiet)

        yield on_event


@contextmanager
def previews(agent: EdgeAgent, settings: Settings, prompt: str, tell: OnEvent) -> Iterator[OnEvent]:
    """Keep what the picture is becoming in a file beside it, for as long as it is drawn."""
    if settings.preview is None:
        yield tell
        return
    from edge_agent.gallery.preview import PreviewFile

    def say(message: str | None) -> None:
        if message and not settings.quiet:
            note(message)

    if agent.bundle.diffusion.preview is None:
        say("no preview: the bundle has no small decoder; export it with --preview-vae")
    elif settings.memory is Memory.LOW:
        say("no preview with --memory low, which has one network open at a time")
    with PreviewFile(_preview_file(settings.output, prompt)) as file:

        def on_event(event: Event) -> None:
            if isinstance(event, Preview):
                say(file.show(event.image))
            tell(event)

        yield on_event


def cancellable(work: Callable[[Cancellation], T]) -> T:
    """Run `work` in a thread, so that the first Ctrl-C can stop it inside a step.

    Python delivers signals only to the main thread and not while that is inside onnxruntime. A
    second Ctrl-C ends the process at once.
    """
    from concurrent.futures import Future, wait
    from threading import Thread

    cancellation = Cancellation()
    future: Future[T] = Future()

    def target() -> None:
        try:
            future.set_result(work(cancellation))
        except BaseException as err:
            future.set_exception(err)

    def on_interrupt(*_: object) -> None:
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)
        cancellation.cancel()

    # What is told to end by another program leaves as little behind as what a person stops.
    kinds = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(kind, on_interrupt) for kind in kinds]
    try:
        Thread(target=target, name="drawing", daemon=True).start()
        while not future.done():
            wait([future], timeout=0.2)  # a wait without end cannot be interrupted on Windows
        if cancellation.cancelled:
            raise Cancelled("stopped")
        return future.result()
    finally:
        for kind, handler in zip(kinds, previous, strict=True):
            signal.signal(kind, handler)


def output_files(output: Path | None, prompt: str, seed: int) -> Iterator[Path]:
    """Yield where the picture may go: `output` alone, or names made of prompt and seed.

    Of the latter the first is to be taken that nobody has. Raises ConfigError.
    """
    if output is not None and not output.is_dir():
        if output.suffix.lower() != ".png":
            raise ConfigError(f"-o {output} does not end in .png; only PNG pictures are written")
        yield output
        return
    stem = (output or Path()) / f"{_words(prompt)}-{seed}"
    yield stem.with_name(f"{stem.name}.png")
    for copy in count(2):
        yield stem.with_name(f"{stem.name}-{copy}.png")


def _words(prompt: str) -> str:
    """Return the beginning of a prompt as a file's name without suffix."""
    words = "".join(letter if letter.isalnum() else " " for letter in prompt.lower()).split()
    return "-".join(words)[:48].rstrip("-") or "picture"


def _preview_file(output: Path | None, prompt: str) -> Path:
    if output is not None and not output.is_dir():
        return output.with_suffix(".preview.png")
    return (output or Path()) / f"{_words(prompt)}.preview.png"


def _tell(event: Event, quiet: bool) -> None:
    if isinstance(event, Fallback) and not quiet:
        what = "keeping the picture of" if event.drawn else "drawing on"
        note(f"{what} the {event.to.value} instead: {event.reason}")
