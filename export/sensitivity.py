"""What each component would cost and save at each precision, so that a user can choose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_agent.bundle import Loss
from export.bundle_writer import SENSITIVITY
from export.loss import Exam
from export.lowering import Unsuited
from export.making import Made
from export.precision import FP32, PRECISIONS
from export.table import aligned


@dataclass(frozen=True, slots=True)
class Trial:
    """A component at a precision; what is not known is None, and `note` says why.

    `milliseconds` is the median time of one call on this machine's processor.
    """

    component: str
    precision: str
    size_bytes: int | None = None
    milliseconds: float | None = None
    loss: Loss | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return a line of the table."""
        loss = self.loss or Loss(None, None, None, False)
        return (
            self.component,
            self.precision,
            _cell(self.size_bytes and self.size_bytes / 1e6, ".1f"),
            _cell(loss.psnr_db, ".1f"),
            _cell(loss.picture_psnr_db, ".1f"),
            _cell(loss.flips, ".1%"),
            _cell(self.milliseconds, ".1f"),
            self.note,
        )


HEADING = ("component", "precision", "MB", "outputs dB", "pictures dB", "flips", "ms", "")


def trial_table(trials: Sequence[Trial]) -> str:
    """Return the trials as a table; times are those of one call on this machine's processor."""
    return aligned([HEADING, *(trial.cells() for trial in trials)], right=range(2, 7))


def try_all(made: Mapping[str, Made], exam: Exam) -> list[Trial]:
    """Return a trial of each component at each precision."""
    trials = []
    for name, part in made.items():
        for precision in PRECISIONS:
            if precision in part.unsuited:
                trials.append(Trial(name, precision, note=part.unsuited[precision]))
                continue
            component = part.components[precision]
            size, taken = component.size_bytes, part.milliseconds.get(precision)
            try:
                loss = None if precision == FP32 else exam.loss({name: component})
                trials.append(Trial(name, precision, size, taken, loss))
            except Unsuited as err:
                trials.append(Trial(name, precision, size, taken, note=str(err)))
    return trials


def report(
    trials: Sequence[Trial], prompts: Sequence[str], pictures: int, created_at: str
) -> dict[str, Any]:
    """Return all trials as one JSON object."""
    return {
        "created_at": created_at,
        "prompts": len(prompts),
        "pictures": pictures,
        "trials": [asdict(trial) for trial in trials],
    }


def read_trials(bundle: Path) -> list[Trial]:
    """Read the trials of a report that lies in a bundle."""
    told = json.loads((bundle / SENSITIVITY).read_text(encoding="utf-8"))["trials"]
    return [Trial(**{**trial, "loss": trial["loss"] and Loss(**trial["loss"])}) for trial in told]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
