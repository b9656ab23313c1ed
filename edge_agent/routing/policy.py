"""From a share of prompts to a threshold on the score (RouteT2I, section 5.2).

The paper sends a prompt to the cloud if prs < alpha, alpha = min(1/2, rho-quantile of prs). Here
score = 1 - prs, so the threshold is 1 - alpha and a prompt goes to the cloud if score > threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import ArrayLike

from edge_agent.errors import ConfigError

QUANTILES = 200


def score_digest(scores: ArrayLike) -> list[float]:
    """Return 200 ascending quantiles of predicted scores, each one of the scores, rounded up."""
    ordered = np.sort(np.asarray(scores, np.float64).ravel())
    if len(ordered) == 0 or not np.isfinite(ordered).all():
        raise ValueError("a score digest needs at least one score, and finite ones")
    ranks = -(-np.arange(QUANTILES) * (len(ordered) - 1) // (QUANTILES - 1))  # exact ceiling
    return [float(score) for score in ordered[ranks]]


def threshold(digest: Sequence[float], share: float, *, capped: bool = True) -> float:
    """Return 1 - alpha for a share rho of prompts sent to the cloud.

    Quantiles are rounded up, so that among the scores the digest was made of at most `share` lie
    above the result. It is never below 1/2: better drawn on the edge stays on the edge; only
    curves over all shares want it without that cap. Share 0 gives 1, which no score exceeds.
    Raises ConfigError for a share outside 0..1.
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigError(
            f"the share of prompts for the cloud must lie between 0 and 1, not {share}; "
            "pass for example --share 0.3"
        )
    if share == 0.0:
        return 1.0
    limit = digest[ceil((1.0 - share) * (len(digest) - 1))]
    return max(0.5, limit) if capped else limit
