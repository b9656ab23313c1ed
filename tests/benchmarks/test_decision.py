"""The programs of benchmarks/ run; how fast they find anything is no matter of tests."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.decision import METRICS, decisions

TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    "bos_token_id": 58,
    "eos_token_id": 59,
}


@pytest.mark.slow
def test_every_part_of_a_decision_runs_at_both_precisions():
    with decisions(TINY, [1, 9], threads=1) as parts:
        for work in parts.values():
            for index in range(3):
                (d,) = work(index)
                assert d.shape == (1, METRICS)
                assert ((d > 0) & (d < 1)).all()
        full, small = (parts[f"{kind} encoder and mixed predictor"](1) for kind in ("fp32", "int8"))
    assert np.abs(full[0] - small[0]).max() < 0.05
    assert not np.array_equal(full[0], small[0])
