"""What an environment takes on the disk, for the benchmark and for the test that holds it."""

from __future__ import annotations

from pathlib import Path

BASE_LIMIT = 260  # megabytes that installing the base may add to an environment


def weigh(environment: Path) -> float:
    """Return the megabytes of all that lies in site-packages, bytecode included.

    Files count as the blocks they take, which is what a small disk runs out of.
    """
    (site,) = (environment / "lib").glob("python*/site-packages")
    files = (path for path in site.rglob("*") if path.is_file())
    return sum(file.stat().st_blocks * 512 for file in files) / 1e6
