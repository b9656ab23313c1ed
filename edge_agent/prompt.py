"""What may be asked for: the one place where prompts and requests are checked."""

from __future__ import annotations

import math
import unicodedata

from edge_agent.errors import ConfigError
from edge_agent.types import Request, Route, SamplerName

MAX_PROMPT_BYTES = 4096
MAX_SEED = 2**63 - 1
MAX_STEPS = 200
DEFAULT_DEADLINE_S, MAX_DEADLINE_S = 120.0, 86_400.0
_SPACES = "\t\n\r"


def check_prompt(prompt: str) -> None:
    """Raise ConfigError when `prompt` cannot be drawn: blank, too long, or not text."""
    if not prompt.strip():
        raise ConfigError(f"the prompt {prompt!r} is empty; say what to draw")
    _check_text(prompt, "prompt")


def check_request(request: Request) -> None:
    """Raise ConfigError for a value that no model could draw, naming it.

    What depends on the model (largest size, multiple of its latent scale) is checked where it
    draws.
    """
    check_prompt(request.prompt)
    _check_text(request.negative_prompt, "negative prompt")
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        raise ConfigError(f"the seed {request.seed} is out of range; choose 0 to {MAX_SEED}")
    if request.steps is not None and not 1 <= request.steps <= MAX_STEPS:
        raise ConfigError(f"{request.steps} steps are out of range; choose 1 to {MAX_STEPS}")
    if request.preview_every is not None and request.preview_every < 1:
        raise ConfigError(
            f"a preview every {request.preview_every} steps is out of range; choose at least 1"
        )
    for name, size in (("width", request.width), ("height", request.height)):
        if size is not None and size < 1:
            raise ConfigError(f"the {name} {size} is out of range; choose at least 1 pixel")
    if request.guidance is not None and not (
        math.isfinite(request.guidance) and request.guidance >= 0
    ):
        raise ConfigError(f"the guidance {request.guidance} is out of range; choose 0 or more")
    if request.sampler is not None and request.sampler not in set(SamplerName):
        raise ConfigError(
            f"there is no sampler {str(request.sampler)!r}; choose {', '.join(SamplerName)}"
        )
    if request.deadline_s is not None and not 0 < request.deadline_s <= MAX_DEADLINE_S:
        raise ConfigError(
            f"the deadline {request.deadline_s} s is out of range; choose a number of seconds "
            f"above 0, at most {MAX_DEADLINE_S:.0f}"
        )
    if not isinstance(request.route, Route):
        raise ConfigError(f"there is no route {request.route!r}; choose of edge_agent.Route")


def _check_text(text: str, what: str) -> None:
    for character in text:
        category = unicodedata.category(character)
        if category == "Cs":
            raise ConfigError(f"the {what} is not valid UTF-8; check the terminal's encoding")
        if category == "Cc" and character not in _SPACES:
            raise ConfigError(
                f"the {what} contains the control character U+{ord(character):04X}; remove it"
            )
    size_bytes = len(text.encode())
    if size_bytes > MAX_PROMPT_BYTES:
        raise ConfigError(
            f"the {what} has {size_bytes} bytes, more than the limit of {MAX_PROMPT_BYTES}; "
            "shorten it"
        )
