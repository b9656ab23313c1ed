"""The linear predictor in closed form: what small sets of labels can support.

Every column of a table of qualities, one for each model and metric, is taken for a linear function
of the prompt. Models and metrics err on the same prompts, so the columns' principal components are
learnt, each with the ridge that its evidence asks for: what all share is learnt well, what is
noise is shrunk away. A gap between two columns is then the difference of their predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Of the variance between prompts, what the log of their length may explain beside their mean state.
LENGTH_SHARE = 0.03
# The ridge before any label is seen, in units of the mean squared norm of a prompt: log-normal.
PRIOR, PRIOR_SPREAD = 60.0, 0.5
GRID = np.geomspace(0.03, 3000.0, 26)


@dataclass(frozen=True, slots=True)
class Fit:
    """Columns (m) as linear functions of features (p): `features @ weight + bias`."""

    weight: Floats  # (p, m)
    bias: Floats  # (m,)


def fit_columns(features: Floats, columns: Floats) -> Fit:
    """Fit columns (N, m), NaN where nobody rated, by features (N, p): mean state, then length.

    Features of prompts that differ in nothing get weight 0.
    """
    center, scale = features.mean(0), _scale(features)
    u, s, vt = np.linalg.svd((features - center) * scale, full_matrices=False)
    mean = np.nanmean(columns, axis=0)
    residual = np.nan_to_num(columns - mean)  # what is missing is taken for average
    spread = residual.std(0)
    spread[spread == 0] = 1.0
    directions = np.linalg.svd(residual / spread, full_matrices=False)[2]  # (r, m)
    components = residual / spread @ directions.T  # (N, r)
    along = u.T @ components
    ridges = [ridge_by_evidence(s**2, a, c @ c, len(c)) for a, c in zip(
        along.T, components.T, strict=True,
    )]  # fmt: skip
    shrunk = s[:, None] / (s[:, None] ** 2 + np.array(ridges))
    weight = (scale[:, None] * (vt.T @ (shrunk * along))) @ directions * spread
    return Fit(weight, mean - center @ weight)


def ridge_by_evidence(strengths: Floats, along: Floats, energy: float, count: int) -> float:
    """Return the most probable ridge for one column of `count` centred values.

    `strengths` (r,) are the squared singular values of the features, `along` (r,) the column in
    their left singular vectors, `energy` its squared norm. This is the marginal likelihood of a
    Gaussian process with the linear kernel, its noise profiled out (Rasmussen and Williams 2006,
    section 5.4.1), under a log-normal prior.
    """
    if energy == 0:
        return float(GRID[-1])
    rest = max(energy - float(along @ along), 0.0)
    variances = strengths[:, None] / GRID + 1.0  # (r, grid)
    noise = ((along[:, None] ** 2 / variances).sum(0) + rest) / count
    evidence = -0.5 * (np.log(variances).sum(0) + count * np.log(noise))
    prior = -0.5 * (np.log(GRID / PRIOR) / PRIOR_SPREAD) ** 2
    return float(GRID[np.argmax(evidence + prior)])


def _scale(features: Floats) -> Floats:
    """Return factors (p,) that give the mean states together variance 1, the length its share."""
    variances = features.var(0)
    state = np.full(len(variances) - 1, _inverse_root(variances[:-1].sum()))
    return np.append(state, _inverse_root(variances[-1] / LENGTH_SHARE))


def _inverse_root(variance: float) -> float:
    return float(variance**-0.5) if variance > 1e-12 else 0.0
