"""What the denoiser is told of a prompt, whatever text encoders there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.bundle import DiffusionSpec, open_bundle
from edge_agent.diffusion.conditioning import Conditioner
from edge_agent.routing.encoder import TextEncoder, Tokenizer


class Tower:
    """Answers with its own number everywhere, and one more in the states before the last layer."""

    def __init__(self, number: float, width: int) -> None:
        self.number, self.width, self.runs = number, width, 0

    def run(self, feeds: dict[str, Any]) -> list[np.ndarray]:
        self.runs += 1
        states = np.full((1, feeds["input_ids"].shape[1], self.width), self.number, np.float32)
        return [states, states[:, 0], states + 1]


@pytest.fixture
def towers() -> dict[str, Tower]:
    return {"first": Tower(1.0, 2), "second": Tower(5.0, 3)}


@pytest.fixture
def spec(tiny_bundle: Path) -> DiffusionSpec:
    both = ("first", "second")
    return replace(
        open_bundle(tiny_bundle).diffusion, text_encoders=both, text_states="penultimate"
    )


@pytest.fixture
def encoders(towers: dict[str, Tower], tiny_bundle: Path) -> dict[str, TextEncoder]:
    tokenizer = Tokenizer(tiny_bundle / "tokenizer.json", 16, 0)
    return {name: TextEncoder(tower, tokenizer) for name, tower in towers.items()}


def test_two_encoders_speak_side_by_side(
    spec: DiffusionSpec, encoders: dict[str, TextEncoder]
) -> None:
    feeds = Conditioner(spec, encoders).encode("a cat", {})
    assert feeds["encoder_hidden_states"].shape == (1, 16, 5)
    assert feeds["encoder_hidden_states"][0, 3].tolist() == [2, 2, 6, 6, 6]
    assert feeds["text_embeds"].tolist() == [[5, 5, 5]]
    assert feeds["pooled_projections"].tolist() == [[1, 1, 5, 5, 5]]


def test_a_model_that_reads_the_last_layer_gets_it(
    spec: DiffusionSpec, encoders: dict[str, TextEncoder]
) -> None:
    spec = replace(spec, text_states="hidden", text_encoders=("second",))
    feeds = Conditioner(spec, encoders).encode("a cat", {})
    assert feeds["encoder_hidden_states"][0, 3].tolist() == [5, 5, 5]


def test_what_the_router_has_encoded_is_not_encoded_again(
    spec: DiffusionSpec, encoders: dict[str, TextEncoder], towers: dict[str, Tower]
) -> None:
    known = {"first": encoders["first"].encode("a cat")}
    Conditioner(spec, encoders).encode("a cat", known)
    assert (towers["first"].runs, towers["second"].runs) == (1, 1)


def test_a_negative_prompt_is_encoded_once(
    spec: DiffusionSpec, encoders: dict[str, TextEncoder], towers: dict[str, Tower]
) -> None:
    conditioner = Conditioner(spec, encoders)
    first = conditioner.against("")
    assert first["text_embeds"].any()
    assert conditioner.against("") is first
    assert towers["second"].runs == 1
    conditioner.against("a dog")
    assert towers["second"].runs == 2


def test_an_empty_negative_prompt_may_stand_for_zeros(
    spec: DiffusionSpec, encoders: dict[str, TextEncoder]
) -> None:
    conditioner = Conditioner(replace(spec, empty_is_zeros=True), encoders)
    assert not any(array.any() for array in conditioner.against("").values())
    assert all(array.any() for array in conditioner.against("a dog").values())
