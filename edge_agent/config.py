"""Effective settings: flag, then EDGE_AGENT_* variable, then config.toml, then default.

Every value is parsed here, whichever of the four it came from, and an error names the value and
where it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from edge_agent.errors import ConfigError
from edge_agent.prompt import DEFAULT_DEADLINE_S, MAX_DEADLINE_S, MAX_SEED, MAX_STEPS
from edge_agent.types import Memory, Provider, Request, Route, SamplerName

ENV_PREFIX = "EDGE_AGENT_"
_LEAST_MONEY, _MOST_MONEY = Decimal("0.000001"), Decimal(1_000_000)
LONGEST_HISTORY = 60  # pictures; accuracy is flat well before (ICIIA, figure 6)
_PLACES = ("bundle", "ledger", "histories")  # one each, wherever the command is called from
_AMOUNT = "an amount from 0 to 1000000 with at most six decimals"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Option(Generic[T]):
    """One setting: how it is read and shown. `expected` completes the sentence "choose ..."."""

    parse: Callable[[str], T]
    default: T
    expected: str
    help: str
    metavar: str = ""

    @property
    def is_switch(self) -> bool:
        """Whether this is on or off, and so takes no value on the command line."""
        return isinstance(self.default, bool)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()  # no shell does it for a variable or a file
    except RuntimeError as err:
        raise ValueError(text) from err


def _switch(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "on": True}
    words |= {"false": False, "0": False, "no": False, "off": False}
    return words[text.lower()]


def _between(kind: Callable[[str], T], low: float, high: float = math.inf) -> Callable[[str], T]:
    def parse(text: str) -> T:
        value = kind(text)
        if not low <= cast(float, value) <= high or cast(float, value) == math.inf:
            raise ValueError(text)
        return value

    return parse


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= MAX_DEADLINE_S:
        raise ValueError(text)
    return value


def _money(text: str) -> Decimal:
    try:
        amount = Decimal(text)
        # Counted in whole millionths: a finer amount would silently become another one.
        if 0 <= amount <= _MOST_MONEY and amount == amount.quantize(_LEAST_MONEY):
            return amount
    except InvalidOperation as err:
        raise ValueError(text) from err
    raise ValueError(text)


def _size(text: str) -> tuple[int, int]:
    width, height = text.lower().split("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(text)
    return int(width), int(height)


def _address(text: str) -> str:
    from protos.address import parse_address

    return str(parse_address(text))


OPTIONS: dict[str, Option[Any]] = {
    "bundle": Option(
        _path, None, "a folder", "The bundle that `python -m export` wrote.", "FOLDER"
    ),
    "share": Option(
        _between(float, 0, 1),
        None,
        "a number from 0 to 1",
        "Share of prompts that may go to the cloud.",
        "0..1",
    ),
    "cap": Option(
        _switch,
        True,
        "true or false",
        "Keep here what this device is expected to draw at least as well, whatever the share; "
        "without it the share is filled, for curves over all shares.",
    ),
    "cascade": Option(
        _switch,
        False,
        "true or false",
        "Draw here first, and ask the cloud only where that picture fell short.",
    ),
    "offline": Option(_switch, False, "true or false", "Open no connection at all."),
    "cloud": Option(
        _address, None, "HOST:PORT, such as 127.0.0.1:50051", "Address of the cloud.", "HOST:PORT"
    ),
    "pace": Option(
        _switch,
        False,
        "true or false",
        "Move the threshold so that the share is kept; with a budget that is always so.",
    ),
    "budget_pictures": Option(
        _between(int, 0, 10**9),
        None,
        "a whole number from 0 up",
        "Pictures that the cloud may draw in a day.",
        "NUMBER",
    ),
    "budget_cost": Option(
        _money, None, _AMOUNT, "What the cloud may cost in a day; needs --cloud-cost.", "AMOUNT"
    ),
    "cloud_cost": Option(_money, None, _AMOUNT, "What a picture from the cloud costs.", "AMOUNT"),
    "ledger": Option(_path, None, "a file", "Where the budget is kept.", "FILE"),
    "route": Option(
        Route, Route.AUTO, "auto, edge or cloud", "Where to draw: auto, edge or cloud.", "SIDE"
    ),
    "deadline": Option(
        _seconds,
        DEFAULT_DEADLINE_S,
        f"a number of seconds above 0, at most {MAX_DEADLINE_S:.0f}",
        "How long to wait for the cloud before drawing here.",
        "SECONDS",
    ),
    "private": Option(_switch, False, "true or false", "Keep the prompt on this device."),
    "seed": Option(
        _between(int, 0, MAX_SEED),
        None,
        f"a whole number from 0 to {MAX_SEED}",
        "Same seed and settings, same picture; random unless given.",
        "NUMBER",
    ),
    "size": Option(
        _size, None, "WIDTHxHEIGHT in pixels, such as 128x128", "Size of the picture.", "WxH"
    ),
    "steps": Option(
        _between(int, 1, MAX_STEPS),
        None,
        f"a whole number from 1 to {MAX_STEPS}",
        "Denoising steps.",
        "NUMBER",
    ),
    "guidance": Option(
        _between(float, 0),
        None,
        "a number from 0 up",
        "Strength of guidance; 1 or less turns it off.",
        "NUMBER",
    ),
    "sampler": Option(
        SamplerName,
        None,
        ", ".join(SamplerName),
        "How the device walks from noise to a picture; by default as the model's scheduler.",
        "NAME",
    ),
    "preview": Option(
        _between(int, 1, MAX_STEPS),
        None,
        f"a whole number from 1 to {MAX_STEPS}",
        "Show a rough picture every so many steps, where drawn here, in NAME.preview.png.",
        "STEPS",
    ),
    "negative_prompt": Option(str, "", "text", "What the picture should not show.", "TEXT"),
    "output": Option(
        _path, None, "a .png file or a folder", "The picture's file, or a folder for it.", "FILE"
    ),
    "client": Option(str, "owner", "a name", "Whose pictures these are.", "ID"),
    "history": Option(
        _between(int, 0, LONGEST_HISTORY),
        None,
        f"a whole number from 0 to {LONGEST_HISTORY}",
        "Earlier pictures of the client to look at; by default what the bundle was trained for.",
        "NUMBER",
    ),
    "histories": Option(_path, None, "a folder", "Where clients' histories are kept.", "FOLDER"),
    "top": Option(
        _between(int, 1, 1000), 5, "a whole number from 1 to 1000", "Labels to show.", "NUMBER"
    ),
    "provider": Option(
        Provider,
        Provider.AUTO,
        ", ".join(Provider),
        "What runs the networks; auto: what `doctor --measure` found fastest, or the processor.",
        "NAME",
    ),
    "memory": Option(
        Memory,
        Memory.NORMAL,
        ", ".join(Memory),
        "low: one network open at a time; normal: open once used; high: all open from the start.",
        "MODE",
    ),
    "threads": Option(
        _between(int, 1, 1024),
        None,
        "a whole number from 1 to 1024",
        "Threads per network; by default one per processor.",
        "NUMBER",
    ),
    "json": Option(_switch, False, "true or false", "Print JSON, one object a line."),
    "quiet": Option(_switch, False, "true or false", "Print no progress and no notes."),
    "debug": Option(_switch, False, "true or false", "Show the traceback of an error."),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Effective values, and for each where it came from."""

    bundle: Path
    share: float | None
    cap: bool
    cascade: bool
    offline: bool
    cloud: str | None
    pace: bool
    budget_pictures: int | None
    budget_cost: Decimal | None
    cloud_cost: Decimal | None
    ledger: Path
    route: Route
    deadline: float
    private: bool
    seed: int | None
    size: tuple[int, int] | None
    steps: int | None
    guidance: float | None
    sampler: SamplerName | None
    preview: int | None
    negative_prompt: str
    output: Path | None
    client: str
    history: int | None
    histories: Path
    top: int
    provider: Provider
    memory: Memory
    threads: int | None
    json: bool
    quiet: bool
    debug: bool
    sources: Mapping[str, str]

    def request(self, prompt: str) -> Request:
        """Return the request that these settings make of a prompt."""
        width, height = self.size or (None, None)
        return Request(
            prompt=prompt,
            seed=self.seed,
            width=width,
            height=height,
            steps=self.steps,
            guidance=self.guidance,
            sampler=self.sampler,
            negative_prompt=self.negative_prompt,
            route=self.route,
            deadline_s=self.deadline,
            private=self.private,
            preview_every=self.preview,
        )


def config_path() -> Path:
    """Return where the owner's config.toml is looked for."""
    import platformdirs

    return Path(platformdirs.user_config_dir("routet2i-edge")) / "config.toml"


def ledger_path() -> Path:
    """Return where the budget is kept unless told otherwise: the user's state folder."""
    import platformdirs

    return Path(platformdirs.user_state_dir("routet2i-edge")) / "budget.sqlite3"


def histories_path() -> Path:
    """Return where histories of clients are kept unless told otherwise: the user's state folder."""
    import platformdirs

    return Path(platformdirs.user_state_dir("routet2i-edge")) / "recognition"


def resolve(
    flags: Mapping[str, str | bool | None],
    env: Mapping[str, str],
    config_file: Path | None = None,
) -> Settings:
    """Merge flags (raw, by option name), environment, config file and defaults.

    Raises ConfigError naming the bad value and its source.
    """
    config_file = config_file or config_path()
    from_file = _read_config(config_file)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, option in OPTIONS.items():
        variable = ENV_PREFIX + name.upper()
        flag = flags.get(name)
        if flag is not None:
            raw, source = flag, "--" + name.replace("_", "-")
        elif env.get(variable):
            raw, source = env[variable], variable
        elif name in from_file:
            raw, source = from_file[name], f"{name} in {config_file}"
        else:
            values[name], sources[name] = option.default, "default"
            continue
        values[name], sources[name] = _parse(option, raw, source), source
        if name in _PLACES and name in from_file and source.startswith(f"{name} in "):
            values[name] = config_file.parent / values[name]
    if values["bundle"] is None:
        from edge_agent.bundle import default_path

        values["bundle"] = default_path()
    values["ledger"] = values["ledger"] or ledger_path()
    values["histories"] = values["histories"] or histories_path()
    return Settings(**values, sources=sources)


def _parse(option: Option[T], raw: object, source: str) -> T:
    # TOML's own true, 5 and 0.3 read like the same words on the command line.
    text = str(raw).lower() if isinstance(raw, bool) else str(raw)
    try:
        if not isinstance(raw, (str, bool, int, float)):
            raise ValueError(text)
        return option.parse(text)
    except (ValueError, KeyError, OverflowError) as err:
        raise ConfigError(f"{source} is {text!r}; choose {option.expected}") from err


def _read_config(file: Path) -> dict[str, Any]:
    try:
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as err:
        raise ConfigError(f"cannot read {file} ({err.strerror}); check its owner") from err
    import tomllib

    try:
        content = tomllib.loads(raw.decode("utf-8-sig"))
    except ValueError as err:
        raise ConfigError(f"{file} is not valid TOML ({err}); correct it there") from err
    for key in content:
        if key not in OPTIONS:
            import difflib

            near = difflib.get_close_matches(key, OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose of {', '.join(OPTIONS)}"
            raise ConfigError(f"{file} sets {key!r}, which is no setting; {hint}")
    return content
