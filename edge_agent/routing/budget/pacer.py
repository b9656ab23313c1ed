"""The threshold that keeps a share whatever prompts come: an integral controller of one number.

The quantile of calibration prompts holds while prompts stay like those. Here the share that is
looked up in the score digest (percentile space: 1 - percentile) moves with the running error,

    looked up = rho - eta * ahead,    ahead += sent - rho   after every decision,

which is the stochastic quantile tracker, or dual gradient descent, of adaptive conformal inference
(Gibbs & Candès 2021). Summed up, for any sequence of prompts worth sending (score above 1/2),

    |sent - rho * T| <= (1 + 2 * eta) / eta.

A score of 1/2 or less stays on the edge whatever the budget, as RouteT2I's section 5.2 has it, so
that with such prompts only `sent - rho * T <= (1 + 2 * eta) / eta` can hold, and does. Without that
cap both sides hold for any prompts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from edge_agent.routing.policy import threshold

ETA = 0.1


@dataclass(frozen=True, slots=True)
class Pace:
    """All that a pacer remembers, in pictures.

    `ahead` is how many more were sent than the share allows, negative when fewer; `credit` is the
    part of it that was earned by sending nothing since the cloud last answered.
    """

    ahead: float = 0.0
    credit: float = 0.0

    def answered(self) -> Pace:
        """Return the pace after the cloud was there: what was earned before is earned."""
        return Pace(self.ahead)

    def failed(self, *, counted: bool) -> Pace:
        """Return the pace after a call that drew nothing; `counted`: a decision had counted it.

        Credit of a time in which the cloud could not be used is void, or all of it would be spent
        on the first prompts after its return (integral windup).
        """
        return Pace(self.ahead + self.credit - counted)


@dataclass(frozen=True, slots=True)
class Pacer:
    """Keeps `share` of prompts (0..1) for the cloud, starting at its quantile in `digest`.

    Unless `capped` it sends prompts that the edge draws as well, too, to keep it.
    """

    digest: Sequence[float]
    share: float
    eta: float = ETA
    capped: bool = True

    def threshold(self, pace: Pace) -> float:
        """Return the score above which a prompt goes to the cloud now; at least 1/2 if capped."""
        if self.share == 0.0:
            return 1.0
        looked_up = self.share - self.eta * pace.ahead
        # Beyond 1 even the least score of the digest must go, which no quantile can say.
        if looked_up > 1.0:
            return 0.5 if self.capped else 0.0
        return threshold(self.digest, max(0.0, looked_up), capped=self.capped)

    def decided(self, pace: Pace, *, sent: bool) -> Pace:
        """Return the pace after one more prompt, which was sent or stayed."""
        lowest = self._lowest()
        before = max(pace.ahead, lowest)
        after = max(before + sent - self.share, lowest)
        return Pace(after, pace.credit + before + sent - after)

    def _lowest(self) -> float:
        """Return the `ahead` below which the threshold is at its lowest anyway, less one step.

        Prompts that the edge draws as well cannot be sent, and must not earn credit without end.
        """
        below = max(0, bisect_right(self.digest, 0.5) - 1) if self.capped else 0
        kept = below / max(1, len(self.digest) - 1)
        return (self.share - (1.0 - kept) - self.eta) / self.eta
