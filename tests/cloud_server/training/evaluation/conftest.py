"""One made-up pair of models for all tests of the evaluation."""

from __future__ import annotations

import pytest

from tests.made_up import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    """240 prompts, 4 seeds, three metrics; see `make_world`."""
    return make_world()
