"""Prompts and requests that nobody could draw are refused with their value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edge_agent.errors import ConfigError
from edge_agent.prompt import MAX_PROMPT_BYTES, check_prompt, check_request
from edge_agent.types import Request


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt '' is empty"),
        (" \n\t ", "is empty"),
        ("a" * 100_000, f"100000 bytes, more than the limit of {MAX_PROMPT_BYTES}"),
        ("é" * 2049, "4098 bytes"),
        ("a\x00cat", r"control character U\+0000"),
        ("a\x1b[31mcat", r"U\+001B"),
        ("a\x85cat", r"U\+0085"),
        ("a\udcffcat", "not valid UTF-8"),
    ],
)
def test_refuses_a_bad_prompt_and_says_why(prompt: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_prompt(prompt)


@pytest.mark.parametrize("prompt", ["a cat", "två\tröda\näpplen", "🦊" * 1024, "<|endoftext|>"])
def test_accepts_what_a_person_may_type(prompt: str) -> None:
    check_prompt(prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"steps": 0}, "0 steps"),
        ({"steps": 10_000}, "10000 steps"),
        ({"width": 0}, "width 0"),
        ({"height": -8}, "height -8"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"sampler": "plms"}, "no sampler 'plms'"),
        ({"deadline_s": 0.0}, "deadline 0.0"),
        ({"negative_prompt": "\x07"}, r"negative prompt .*U\+0007"),
    ],
)
def test_refuses_a_bad_request_and_names_the_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_request(replace(Request("a cat"), **change))
