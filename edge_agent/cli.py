"""The command `edge-agent`: results on stdout, everything else on stderr, errors in one sentence.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_agent.config import OPTIONS, Settings, resolve
from edge_agent.errors import AgentError, Cancelled, ConfigError
from edge_agent.runtime.network import is_out_of_memory, out_of_memory
from edge_agent.terminal import (
    PROGRAM,
    cancellable,
    note,
    note_ignored,
    note_undecided,
    note_unheard,
    output_files,
    previews,
    print_json,
    progress,
    prompts_in,
)
from edge_agent.types import Result

if TYPE_CHECKING:
    from edge_agent.agent import EdgeAgent
    from edge_agent.bundle import Bundle
    from edge_agent.recognition.recognizer import Label, Recognition, Recognizer
    from edge_agent.routing.budget.ledger import Ledger

Command = Callable[..., Any]
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # what a redirected stdout can say
_BUDGET = ("budget_pictures", "budget_cost", "cloud_cost", "ledger")
_RECOGNIZING = ("client", "history", "histories", "top")
_DRAWING = tuple(name for name in OPTIONS if name not in _RECOGNIZING)
_COMPUTING = ("provider", "memory", "threads")
_DECIDING = ("bundle", "share", "cap", *_COMPUTING, "json", "quiet", "debug")


@dataclass(slots=True)
class State:
    """What one run of the command knows beside its flags."""

    env: Mapping[str, str]
    debug: bool


class DefaultGroup(click.Group):
    """A group that takes anything but a command's name for the arguments of `generate`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `generate` in front of a bare prompt, but not of what must have been a command."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            self._refuse_misspelt(ctx, args[0])
            self._refuse_flags_before(ctx, args)
            args = ["generate", *args]
        return super().parse_args(ctx, args)

    def _refuse_flags_before(self, ctx: click.Context, args: list[str]) -> None:
        generate, given = self.commands["generate"], dict[str, Any]()
        with suppress(click.UsageError):  # of which generate itself tells
            given, _, _ = generate.make_parser(click.Context(generate)).parse_args(list(args))
        first = next(iter(given.get("prompt") or ()), "")
        if args[0].startswith("-") and first in self.commands:
            ctx.fail(
                f"put {first} before its flags; a picture of that word is drawn by "
                f"`{PROGRAM} generate {first}`"
            )

    def _refuse_misspelt(self, ctx: click.Context, word: str) -> None:
        import difflib

        if len(word.split()) > 1:
            return
        for near in difflib.get_close_matches(word, self.commands, n=1, cutoff=0.75):
            ctx.fail(
                f"{word!r} is no command; did you mean {near!r}? A picture of that word is drawn "
                f"by `{PROGRAM} generate {word}`"
            )


def settings_options(*names: str) -> Callable[[Command], Command]:
    """Add the flags of these settings, unparsed: `resolve` reads all four sources alike."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            option, flag = OPTIONS[name], "--" + name.replace("_", "-")
            if option.is_switch:
                declared = [f"{flag}/--no-{flag.removeprefix('--')}", name]
                add = click.option(*declared, default=None, help=option.help)
            else:
                declared = ["-o", flag, name] if name == "output" else [flag, name]
                add = click.option(*declared, metavar=option.metavar, help=option.help)
            command = add(command)
        return command

    return decorate


@click.group(
    cls=DefaultGroup,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="routet2i-edge", prog_name=PROGRAM)
def cli() -> None:
    """Draw pictures on this device when it is good enough, in the cloud where that buys quality.

    `edge-agent PROMPT` is `edge-agent generate PROMPT`. Every option can also be set by an
    EDGE_AGENT_* variable or in config.toml; `edge-agent doctor` shows what holds.
    """


@cli.command()
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("--file", metavar="FILE", help="Read prompts from FILE, one a line; - is stdin.")
@settings_options(*_DECIDING)
@click.pass_obj
def route(state: State, /, prompts: tuple[str, ...], file: str | None, **flags: Any) -> None:
    """Decide where each PROMPT would be drawn; draw nothing, open no connection."""
    settings = _resolve(state, flags)
    everything = [*prompts, *(prompts_in(file) if file else ())]
    if not everything:
        raise ConfigError("there is no prompt to decide on; give PROMPT... or --file FILE")
    from edge_agent.prompt import check_prompt

    for number, prompt in enumerate(everything, 1):
        try:
            check_prompt(prompt)
        except ConfigError as err:
            if len(everything) == 1:
                raise
            raise ConfigError(f"prompt {number} of {len(everything)}: {err}") from err
    started = time.perf_counter()
    # Here a cascade has no picture to look at.
    with _open_agent(replace(settings, cascade=False)) as agent:
        agent.open(drawing=False)
        opened = time.perf_counter()
        for prompt in everything:
            begun = time.perf_counter()
            decision = agent.route(prompt)
            ended = time.perf_counter()
            if settings.json:
                from edge_agent.records import decision_to_json

                timings_ms = {"open": 1e3 * (opened - started), "decide": 1e3 * (ended - begun)}
                print_json(decision_to_json(prompt, decision, timings_ms))
            else:
                told = " ".join(prompt.split())  # one line each
                click.echo(f"{decision.route.value:<5}  {decision.score:.3f}  {told}")
            if not settings.quiet:
                note_ignored(decision)
    if not (settings.json or settings.quiet):
        note(f"cloud above score {decision.threshold:.3f}, at a share of {decision.share:g}")
        if settings.cascade:
            note("that is what the prompt alone says; a cascade decides when it has drawn")


@cli.command()
@click.argument("prompt", nargs=-1, required=True, metavar="PROMPT")
@settings_options(*_DRAWING)
@click.pass_obj
def generate(state: State, /, prompt: tuple[str, ...], **flags: Any) -> None:
    """Draw PROMPT and print the picture's path."""
    settings = _resolve(state, flags)
    request = settings.request(" ".join(prompt))
    from edge_agent.gallery.png import check_folder, write_first
    from edge_agent.prompt import MAX_SEED, check_request
    from edge_agent.records import png_record, result_to_json

    check_request(request)
    check_folder(next(output_files(settings.output, request.prompt, MAX_SEED)))
    with (
        _open_agent(settings) as agent,
        progress(settings.quiet) as tell,
        previews(agent, settings, request.prompt, tell) as on_event,
    ):
        result = cancellable(lambda flag: agent.generate(request, on_event, flag))
        tags = _tags(agent.bundle, settings, result)
    if not settings.quiet:
        note_ignored(result.decision)
        note_undecided(result.decision)
        note_unheard(result)
    files = output_files(settings.output, result.prompt, result.picture.seed)
    file = write_first(files, result.picture.image, png_record(result, tags))
    if settings.json:
        print_json(result_to_json(result, file, tags))
    else:
        click.echo(file)
        if not settings.quiet:
            note(
                f"drawn on the {result.drawn_on.value} by {result.picture.model}, "
                f"seed {result.picture.seed}, {result.timings_ms['total'] / 1e3:.1f} s"
            )


@cli.command()
@click.argument("images", nargs=-1, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option("--forget", metavar="ID", help="Delete the history of this client.")
@settings_options("bundle", *_RECOGNIZING, *_COMPUTING, "json", "quiet", "debug")
@click.pass_obj
def recognize(state: State, /, images: tuple[Path, ...], forget: str | None, **flags: Any) -> int:
    """Say what is in each IMAGE, in the light of the client's earlier pictures.

    A folder stands for the pictures in it, 16 of which are looked at together. What is remembered
    are feature vectors of the last 60, which stay on this device; pictures themselves are not kept.
    """
    settings = _resolve(state, flags)
    if forget is not None:
        _forget(settings, forget)
    if not images:
        if forget is None:
            raise ConfigError("there is no picture to recognise; give IMAGE... or a folder")
        return 0
    from edge_agent.bundle import open_bundle
    from edge_agent.recognition.recognizer import Recognizer

    recognizer = Recognizer(
        open_bundle(settings.bundle),
        settings.histories,
        history=settings.history,
        top=settings.top,
        provider=settings.provider,
        memory=settings.memory,
        threads=settings.threads,
    )
    failed, notes = False, set[str]()
    try:
        for found in _recognized(recognizer, images, settings.client):
            if isinstance(found, AgentError):
                failed = True
                note(str(found))
                continue
            if found.note and found.note not in notes and not settings.quiet:
                note(found.note)
                notes.add(found.note)
            _print_recognition(found, settings)
    except KeyboardInterrupt as err:
        return _fail(state, 130, "stopped; what was recognised so far is remembered", err)
    return 1 if failed else 0


@cli.command()
@click.option(
    "--measure", is_flag=True, help="Time every installed provider first, for --provider auto."
)
@settings_options("offline", "cloud", *_BUDGET, *_DECIDING)
@click.pass_obj
def doctor(state: State, /, measure: bool, **flags: Any) -> int:
    """Check the bundle, the networks, the cloud and the settings; exit 1 if it cannot draw."""
    from edge_agent.doctor import examine, report_lines

    settings = _resolve(state, flags)
    tell = (lambda _: None) if settings.quiet else note
    report = examine(settings, tell if measure else None)
    if settings.json:
        print_json(report)
    else:
        click.echo("\n".join(report_lines(report)))
    return 0 if report["bundle"]["ok"] else 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:] if arguments is None else arguments, os.environ))


def run(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Run the command and return its exit code: the one place where errors become sentences."""
    state = State(env, debug="--debug" in arguments)
    try:
        code = cli.main(list(arguments), PROGRAM, standalone_mode=False, obj=state)
        if sys.stdout is not None:  # closed, as daemons may be started
            sys.stdout.flush()
    except click.ClickException as err:
        err.show()
        return err.exit_code
    except BrokenPipeError:
        # Whoever read our output has left; Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, click.Abort, Cancelled) as err:
        return _fail(state, 130, "stopped; nothing was written", err)
    except ConfigError as err:
        return _fail(state, 2, str(err), err)
    except AgentError as err:
        return _fail(state, 1, str(err), err)
    except OSError as err:
        if err.errno not in _NO_ROOM:
            return _fail(state, 1, _unexpected(err), err)
        told = f"the answer could not be printed ({err.strerror}); free some space"
        return _fail(state, 1, told, err)
    except Exception as err:  # the outermost edge: a person gets a sentence whatever happens
        return _fail(state, 1, _unexpected(err), err)
    return int(code or 0)


def _unexpected(err: Exception) -> str:
    if is_out_of_memory(err):
        return str(out_of_memory("the command"))
    return f"unexpected {type(err).__name__}: {err}; run it again with --debug and report it"


def _fail(state: State, code: int, message: str, err: BaseException) -> int:
    if state.debug:
        import traceback

        traceback.print_exception(err)
    note(message)
    return code


def _resolve(state: State, flags: Mapping[str, Any]) -> Settings:
    settings = resolve(flags, state.env)
    state.debug = settings.debug
    return settings


def _open_agent(settings: Settings) -> EdgeAgent:
    from edge_agent.agent import EdgeAgent, LazyCloud
    from edge_agent.bundle import open_bundle

    address = None if settings.offline else settings.cloud
    return EdgeAgent(
        open_bundle(settings.bundle),
        cloud=None if address is None else LazyCloud(lambda: _connect(address)),
        share=settings.share,
        capped=settings.cap,
        budget=_budget(settings),
        cascade=settings.cascade,
        offline=settings.offline,
        provider=settings.provider,
        memory=settings.memory,
        threads=settings.threads,
    )


def _budget(settings: Settings) -> Ledger | None:
    limited = (settings.budget_pictures, settings.budget_cost) != (None, None)
    if not (settings.pace or limited):
        return None
    from edge_agent.routing.budget.ledger import Ledger, Limits

    limits = Limits(settings.budget_pictures, settings.budget_cost, settings.cloud_cost)
    return Ledger(settings.ledger, limits)


def _tags(bundle: Bundle, settings: Settings, result: Result) -> Sequence[Label] | None:
    """Return what the bundle's recogniser, if it has one, sees in a picture that was drawn."""
    if bundle.recognizer is None:
        return None
    from edge_agent.recognition.recognizer import Recognizer

    try:
        recognizer = Recognizer(
            bundle,
            settings.histories,
            top=settings.top,
            provider=settings.provider,
            memory=settings.memory,
            threads=settings.threads,
        )
        return recognizer.tags(result.picture.image)
    except (AgentError, MemoryError, ImportError, KeyboardInterrupt) as err:
        # No reason to lose a picture that is there, and perhaps was paid for.
        note(f"the picture has no tags: {str(err) or type(err).__name__}")
        return None


def _forget(settings: Settings, client: str) -> None:
    from edge_agent.recognition.history import forget

    existed = forget(settings.histories, client)
    if not settings.quiet:
        what = "the history of" if existed else "there was no history of"
        note(f"{what} client {client!r}{' is deleted' if existed else ''}")


def _recognized(
    recognizer: Recognizer, images: Sequence[Path], client: str
) -> Iterator[Recognition | AgentError]:
    from edge_agent.errors import PictureError
    from edge_agent.recognition.pictures import pictures_in

    for image in images:
        try:
            if image.is_dir():
                yield from recognizer.recognize_all(pictures_in(image), client)
            else:
                yield recognizer.recognize(image, client)
        except PictureError as err:
            yield err


def _print_recognition(found: Recognition, settings: Settings) -> None:
    if settings.json:
        labels = [{"name": one.name, "probability": one.probability} for one in found.labels]
        about = {"client": settings.client, "adapted": found.adapted, "history": found.history}
        print_json({"file": str(found.file), "labels": labels, **about})
    else:
        labels_shown = ", ".join(f"{one.name} {one.probability:.1%}" for one in found.labels)
        click.echo(f"{found.file}: {labels_shown}")


def _connect(address: str) -> Any:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say comes as an error as well
    from edge_agent.cloud.client import CloudClient

    return CloudClient(address)
