"""What is told of memory is what was held."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edge_agent.runtime.memory import peak_rss

PROGRAM = """if True:
    from edge_agent.runtime.memory import peak_rss
    before = peak_rss()
    held = bytearray(200_000_000)
    del held
    print(before, peak_rss())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="not known there")
def test_the_peak_rises_by_what_is_held_and_does_not_fall() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert 5e6 < before < 2e8, "a new process has not held what its parent has"
    assert 1.9e8 < after - before < 2.2e8
    assert (peak_rss() or 0) > before
