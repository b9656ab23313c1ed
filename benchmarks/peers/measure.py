"""One contender in a process of its own: its start, its times, its memory, its picture.

`python -m benchmarks.peers.measure '{...}' OUT.json`; the parent's clock is this one's too.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.contenders import Task, open_contender


def measure(wanted: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Draw, and return what it took and the picture of seed 0.

    `first_s` is from the start of the process to the first picture, which has `warm_up_steps`; or,
    if `ready`, which draws nothing, `ready_s` to when everything is open.
    """
    contender = open_contender(wanted["contender"], Task(Path(wanted["home"]), wanted["threads"]))
    if wanted.get("ready"):
        contender.open()
        return {"ready_s": time.monotonic() - wanted["started"]}, np.zeros(0)
    contender.draw(0, wanted["warm_up_steps"])
    first_s = time.monotonic() - wanted["started"]
    times = []
    picture = np.zeros(0)
    for index in range(wanted["repeats"]):
        begun = time.perf_counter()
        drawn = contender.draw(index, wanted["steps"])
        times.append(time.perf_counter() - begun)
        picture = drawn if index == 0 else picture
    return {"first_s": first_s, "times_s": times, "peak_rss_mb": _peak_rss_mb()}, picture


def _peak_rss_mb() -> float:
    # ru_maxrss would begin with what the parent held when it started this process.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024 / 1e6


if __name__ == "__main__":
    found, picture = measure(json.loads(sys.argv[1]))
    out = Path(sys.argv[2])
    np.save(out.with_suffix(".npy"), picture)
    out.write_text(json.dumps(found), encoding="utf-8")
