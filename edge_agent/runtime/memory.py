"""How much memory this process has held, as the system counts it."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss() -> int | None:
    """Return the most resident memory of this process so far, in bytes; None where unknown.

    Pages of mapped weights count, though the system takes them back when others need memory.
    """
    try:
        # ru_maxrss would begin with what the parent process held when it started this one.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        import resource
    except ImportError:
        return None  # Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
