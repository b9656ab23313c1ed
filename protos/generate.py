"""Regenerate the Python code of the wire: `python -m protos.generate`, `--check` only compares."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = Path("protos/t2i/v1/image_generation.proto")


def generate(out: Path) -> list[Path]:
    """Write the generated modules below `out`; return their paths relative to it."""
    from grpc_tools import protoc

    status = protoc.main(
        [
            "protoc",
            f"--proto_path={ROOT}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            str(ROOT / SOURCE),
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc failed on {SOURCE} with status {status}; see its message above")
    stem = SOURCE.with_suffix("")
    return [stem.with_name(stem.name + end) for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")]


def stale() -> list[Path]:
    """Return the generated files that differ from what the proto gives now."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        return [
            path
            for path in generate(out)
            if not (ROOT / path).is_file()
            or (ROOT / path).read_bytes() != (out / path).read_bytes()
        ]


def main() -> int:
    """Write or, with `--check`, compare; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m protos.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    if not parser.parse_args().check:
        for path in generate(ROOT):
            print(path)
        return 0
    outdated = stale()
    for path in outdated:
        print(f"{path} is stale; run `python -m protos.generate`", file=sys.stderr)
    return 1 if outdated else 0


if __name__ == "__main__":
    raise SystemExit(main())
