"""The files of a bundle are those that were exported, by size and by digest.

Digests of files that have not changed since they were last verified (same size and modification
time) are taken from a small cache in the user's cache folder, so that opening stays fast.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.errors import REBUILD, BundleError


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of the bundle must look like."""

    sha256: str
    size: int


def check_size(root: Path, relative: str, record: FileRecord) -> None:
    """Raise BundleError when the file `relative` to `root` is missing or of another size."""
    file = root / relative
    try:
        size = file.stat().st_size
    except OSError as err:
        raise BundleError(f"the bundle lacks {file} ({err.strerror}); {REBUILD}") from err
    if size != record.size:
        raise BundleError(
            f"{file} has {size} bytes but the bundle promises {record.size}; {REBUILD}"
        )


def check_digests(
    root: Path, records: Mapping[str, FileRecord], cache_path: Path | None = None
) -> None:
    """Raise BundleError when a file of `records`, by its path below `root`, has another content.

    `cache_path` is `verified.json` in the user's cache folder unless told otherwise.
    """
    cache_path = cache_path or _default_cache_path()
    known = _read_cache(cache_path)
    fresh: dict[str, list[Any]] = {}
    for relative, record in records.items():
        file = (root / relative).resolve()
        try:
            stat = file.stat()
            seal = [stat.st_size, stat.st_mtime_ns, record.sha256]
            if known.get(str(file)) == seal:
                continue
            import hashlib  # loads OpenSSL; not needed once everything is in the cache

            with file.open("rb") as stream:
                actual = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as err:
            raise BundleError(
                f"{file} cannot be read ({err.strerror}); check its owner, or copy the bundle again"
            ) from err
        if actual != record.sha256:
            raise BundleError(
                f"{file} is not what was exported (sha256 {actual[:12]}…, expected "
                f"{record.sha256[:12]}…); {REBUILD}"
            )
        fresh[str(file)] = seal
    if fresh:
        _write_cache(cache_path, known | fresh)


def _default_cache_path() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("routet2i-edge")) / "verified.json"


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(path: Path, content: dict[str, Any]) -> None:
    # A cache that cannot be written only means that the digests are computed again next time.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        there = {name: seal for name, seal in content.items() if Path(name).is_file()}
        temporary.write_text(json.dumps(there))
        temporary.replace(path)
