"""Estimates with 95 % intervals, by formula for shares and their differences, else by bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES: Final = 2000
Z: Final = 1.96


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean of `n` values and the 95 % interval that goes with it, `low` to `high`."""

    mean: float
    low: float
    high: float
    n: int


def average(values: NDArray[Any], seed: int = 0) -> Estimate | None:
    """Return the mean of values (N,), NaN standing for none, with the interval of a bootstrap.

    None if there is no value, here as below.
    """
    known = _known(values)
    n = len(known)
    if n == 0:
        return None
    return _around(float(known.mean()), *_spread(resamples(n, seed) @ known / n), n)


def share(values: NDArray[Any], seed: int = 0) -> Estimate | None:
    """Return the mean of values (N,) in 0..1, NaN standing for none.

    Where all are 0 or 1 the interval is Wilson's, which has a width at 0 % and 100 % too; where
    some lie between, as half of two objects, a bootstrap's.
    """
    known = _known(values)
    n = len(known)
    if n == 0 or not np.isin(known, (0.0, 1.0)).all():
        return average(known, seed)
    mean = float(known.mean())
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    reach = Z * np.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return _around(mean, max(centre - reach, 0.0), min(centre + reach, 1.0), n)


def difference(values: NDArray[Any], seed: int = 0) -> Estimate | None:
    """Return the mean of paired differences (N,) of shares, in -1..1, NaN standing for none.

    The interval is Wald's after adding a 1 and a -1 (Bonett and Price 2012), so that it has a width
    where no pair differs.
    """
    known = _known(values)
    n = len(known)
    if n == 0:
        return None
    more = np.append(known, (1.0, -1.0))
    reach = Z * np.sqrt(more.var() / (n + 2))
    low, high = max(more.mean() - reach, -1.0), min(more.mean() + reach, 1.0)
    return _around(float(known.mean()), low, high, n)


def _known(values: NDArray[Any]) -> Floats:
    floats = np.asarray(values, np.float64)
    return floats[~np.isnan(floats)]


def auroc(better: Floats, worse: Floats, seed: int = 0) -> Estimate:
    """Return how often a score in `better` (..., N) is above one in `worse` (..., N), ties half.

    Rows before the last axis are averaged. Resamples draw whole columns: the two scores of a scene
    stay together.
    """
    wins = (better[..., :, None] > worse[..., None, :]) + 0.5 * (
        better[..., :, None] == worse[..., None, :]
    )
    wins = wins.reshape(-1, *wins.shape[-2:]).mean(0)  # (N, N)
    n = len(wins)
    weights = resamples(n, seed)
    resampled = ((weights @ wins) * weights).sum(1) / n**2
    return _around(float(wins.mean()), *_spread(resampled), n)


def rank_correlation(a: Floats, b: Floats) -> Floats:
    """Return Spearman's correlation (...) of a (..., L) and b (..., L), 0 where one is constant."""
    ranks_a, ranks_b = _centred_ranks(a), _centred_ranks(b)
    scale = np.sqrt((ranks_a**2).sum(-1) * (ranks_b**2).sum(-1))
    product = np.asarray((ranks_a * ranks_b).sum(-1))
    return np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)


def _centred_ranks(values: Floats) -> Floats:
    """Return ranks around 0; equal values share theirs."""
    ranks: Floats = np.sign(values[..., :, None] - values[..., None, :]).sum(-1) / 2
    return ranks


def resamples(n: int, seed: int) -> Floats:
    """Return how often each of `n` values is in each resample, (RESAMPLES, N)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def percentile(mean: float, resampled: Floats, n: int) -> Estimate:
    """Return `mean` with the percentile interval of what it is in resamples (RESAMPLES,).

    Both may be infinite, for what is never reached.
    """
    low = np.percentile(resampled, 2.5, method="lower")
    return _around(mean, float(low), float(np.percentile(resampled, 97.5, method="higher")), n)


def _spread(resampled: Floats) -> tuple[float, float]:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(low), float(high)


def _around(mean: float, low: float, high: float, n: int) -> Estimate:
    # Rounding, and resamples of a few values, may leave out the mean itself.
    return Estimate(mean, float(min(low, mean)), float(max(high, mean)), n)
