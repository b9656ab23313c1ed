"""What a page on a router shows beside its curve: the pair, nouns, reliability, shares, regrets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cloud_server.training.evaluation.measures import plain
from cloud_server.training.evaluation.truth import Truth
from cloud_server.training.intervals import average, percentile, resamples, share
from edge_agent.routing.budget.pacer import Pace, Pacer
from edge_agent.routing.policy import score_digest, threshold

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

ASKED: Final = (0.1, 0.3, 0.5, 0.8)
BINS: Final = 10
RESAMPLED: Final = 500  # of thresholds
FEWEST: Final = 10  # prompts a point of a figure stands for
REQUESTS, WINDOW, DRIFT_SHARE = 2000, 500, 0.3


def the_pair(truth: Truth, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Return what both models score on every metric, and how often the cloud's is better."""
    columns = zip(
        names, truth.weights, truth.edge.T, truth.cloud.T, truth.metric_gain.T, strict=True
    )
    return {
        "metrics": [
            {
                "name": name,
                "weight": float(weight),
                "edge": plain(average(edge, seed)),
                "cloud": plain(average(cloud, seed)),
                "gap": plain(average(cloud - edge, seed)),
                "cloud_delta_p": float(gain.mean()),
            }
            for name, weight, edge, cloud, gain in columns
        ],
        "cloud_wins": plain(share(truth.cloud_wins, seed)),
        "cloud_delta_p": plain(average(truth.gain, seed)),
        "edge_dominated": plain(share(truth.dominated[0], seed)),
        "cloud_dominated": plain(share(truth.dominated[1], seed)),
    }


def by_nouns(truth: Truth, nouns: Floats, seed: int) -> list[dict[str, Any]]:
    """Return how often and by how much the cloud is better, by number of nouns (paper, Fig. 3).

    Numbers at either end that few prompts have stand together, with the next.
    """
    first, *others = numbers = np.unique(nouns).astype(int).tolist()
    starts = [n for n in others if (nouns >= n).sum() >= FEWEST and (nouns < n).sum() >= FEWEST]
    ends = [*(numbers[numbers.index(n) - 1] for n in starts), numbers[-1]]
    rows = []
    for low, high in zip([first, *starts], ends, strict=True):
        mine = (nouns >= low) & (nouns <= high)
        rows.append(
            {
                "nouns": str(low) if low == high else f"{low}\N{EN DASH}{high}",
                "prompts": int(mine.sum()),
                "cloud_wins": plain(share(truth.cloud_wins[mine], seed)),
                "gain": plain(average(truth.gain[mine], seed)),
                "plain_gain": plain(average(truth.plain_gain[mine], seed)),
            }
        )
    return rows


def calibration(predicted: Floats, true: Floats, seed: int) -> dict[str, Any]:
    """Return mean true PRS by bins of predicted PRS (N,) of equal size, and how they go together.

    `slope` is that of true on predicted: below 1 where predictions are spread too far.
    """
    n = len(predicted)
    counts = resamples(n, seed)
    both = _moments(np.ones((1, n)), predicted, true), _moments(counts, predicted, true)
    parts = np.array_split(np.argsort(predicted, kind="stable"), min(BINS, max(1, n // FEWEST)))
    return {
        "correlation": plain(percentile(float(both[0][0][0]), both[1][0], n)),
        "slope": plain(percentile(float(both[0][1][0]), both[1][1], n)),
        "bins": [
            {
                "predicted": float(predicted[part].mean()),
                "true": plain(average(true[part], seed)),
            }
            for part in parts
        ],
    }


def _moments(counts: Floats, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return the correlation (B,) and the slope (B,) of y on x in resamples."""
    n = counts.sum(1)
    mean_x, mean_y = counts @ x / n, counts @ y / n
    xx, yy = counts @ x**2 / n - mean_x**2, counts @ y**2 / n - mean_y**2
    xy = counts @ (x * y) / n - mean_x * mean_y
    nothing = np.full(len(n), np.nan)
    tiny = 1e-15
    together = np.divide(
        xy, np.sqrt(xx.clip(0) * yy.clip(0)), out=nothing.copy(), where=(xx > tiny) & (yy > tiny)
    )
    return together, np.divide(xy, xx, out=nothing.copy(), where=xx > tiny)


def shares(scores: Floats, seed: int) -> list[dict[str, Any]]:
    """Return the share sent beside the share asked for, calibrated on other prompts.

    Prompts (N,) are parted in two; the digest of one half decides for the other, in turn. Intervals
    resample both. `capped` is the product's rule, which sends nothing that the edge is expected to
    draw better; `got` goes by the quantile alone.
    """
    rng = np.random.default_rng(seed)
    one, other = np.array_split(scores[rng.permutation(len(scores))], 2)

    def both(known: Floats, coming: Floats) -> Floats:
        return (_sent(known, coming) + _sent(coming, known)) / 2

    found = both(one, other)
    again = np.stack(
        [both(rng.choice(one, len(one)), rng.choice(other, len(other))) for _ in range(RESAMPLED)]
    )
    return [
        {"asked": asked}
        | {
            name: plain(percentile(float(found[i, j]), again[:, i, j], len(scores)))
            for j, name in enumerate(("got", "capped"))
        }
        for i, asked in enumerate(ASKED)
    ]


def _sent(calibration: Floats, scores: Floats) -> Floats:
    """Return the share of `scores` sent by the digest of others: (asked, without and with cap)."""
    digest = np.array(score_digest(calibration))
    return np.array(
        [
            [
                np.mean(_uncapped(scores, cap) > threshold(_uncapped(digest, cap).tolist(), asked))
                for cap in (False, True)
            ]
            for asked in ASKED
        ]
    )


def _uncapped(scores: Floats, cap: bool) -> Floats:
    """Return scores as they are, or moved above 1/2, where the cap never binds."""
    return scores if cap else 0.5 + 0.5 * scores


def drift(scores: Floats, difficulty: Floats, seed: int) -> dict[str, Any]:
    """Return the share sent, window by window, of prompts that grow ever harder.

    Half of the prompts (N,) calibrate the digest; `REQUESTS` are drawn from the others and sorted
    by `difficulty` (what the cloud was measured to gain), and then by score: the router's own
    opinion, from what it would keep to what it would send, than which no traffic drifts further.
    """
    rng = np.random.default_rng(seed)
    known, coming = np.array_split(rng.permutation(len(scores)), 2)
    drawn = rng.choice(coming, REQUESTS)
    orders = {"difficulty": difficulty[drawn], "score": scores[drawn]}
    result: dict[str, Any] = {"share": DRIFT_SHARE, "window": WINDOW, "requests": REQUESTS}
    for order, by in orders.items():
        requests = scores[drawn[np.argsort(by, kind="stable")]]
        result[order] = {
            "capped" if cap else "uncapped": _both_ways(scores[known], requests, cap)
            for cap in (False, True)
        }
    return result


def _both_ways(known: Floats, requests: Floats, cap: bool) -> dict[str, Any]:
    """Return windows of the fixed quantile and of the paced threshold (budget.pacer)."""
    digest = score_digest(_uncapped(known, cap))
    asked = _uncapped(requests, cap)
    pacer, pace, paced = Pacer(digest, DRIFT_SHARE), Pace(), []
    for score in asked:
        sent = bool(score > pacer.threshold(pace))
        pace = pacer.decided(pace, sent=sent)
        paced.append(sent)
    fixed = asked > threshold(digest, DRIFT_SHARE)
    return {"fixed": _windows(fixed), "paced": _windows(np.array(paced))}


def _windows(sent: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the share in windows of `WINDOW` requests, and how far it is off at most.

    `moving` has one every tenth of a window; `worst` is over all that begin after the first.
    """
    total = np.concatenate([[0], np.cumsum(sent)])
    moving = (total[WINDOW:] - total[:-WINDOW]) / WINDOW
    return {
        "moving": [float(v) for v in moving[:: WINDOW // 10]],
        "windows": [float(v) for v in moving[::WINDOW]],
        "worst": float(np.abs(moving[WINDOW:] - DRIFT_SHARE).max()),
    }


def worst_regrets(
    truth: Truth, prs: Floats, sent: Floats, prompts: Sequence[str], rows: Rows, most: int = 10
) -> list[dict[str, Any]]:
    """Return the prompts whose side lost most against the other, by the gain they gave away.

    `sent` (N,) is 1 where the router chose the cloud at half of the prompts.
    """
    lost = np.where(sent > 0.5, -truth.gain, truth.gain)
    return [
        {
            "prompt": prompts[rows[i]],
            "row": int(rows[i]),
            "route": "cloud" if sent[i] > 0.5 else "edge",
            "lost": float(lost[i]),
            "predicted_prs": float(prs[i]),
            "true_prs": float(truth.prs[i]),
        }
        for i in np.argsort(-lost, kind="stable")[:most]
        if lost[i] > 0
    ]
