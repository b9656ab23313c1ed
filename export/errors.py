"""The one error of exporting; its message is a sentence for the user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from edge_agent.runtime.network import is_out_of_memory

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class ExportError(Exception):
    """Nothing was exported: what happened, the value, the next step."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn whatever loading or tracing raises into one sentence that says which part failed."""
    try:
        yield
    except ExportError:
        raise
    except Exception as err:  # torch, optimum, transformers and onnxruntime share no base class
        if isinstance(err, OSError) and err.errno in NO_ROOM:
            raise
        line = str(err).strip().partition("\n")[0]
        if is_out_of_memory(err) or "could not create a primitive" in line:
            raise ExportError(
                f"memory ran out while the {what} was exported; close other programs, or export on "
                "a larger machine and copy the bundle"
            ) from err
        if "Failed to write" in line:  # onnxruntime's, without a number
            raise ExportError(
                f"the {what} could not be written ({line}); make room on the disk, or choose "
                "another folder with -o"
            ) from err
        raise ExportError(
            f"the {what} could not be exported ({type(err).__name__}: {line}); fetch or train it "
            "again, or see the whole error with --debug"
        ) from err
