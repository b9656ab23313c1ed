"""Table 1 of the paper: what ICIIA adds to six backbones, by our formulas and counts."""

from __future__ import annotations

import pytest

from benchmarks.iciia_cost import TABLE_1, Published, added, backbone_cost
from cloud_server.training.iciia.module import tiny_groups

ROUNDED = 0.06  # the paper gives two digits, of small numbers one


@pytest.mark.parametrize("row", TABLE_1, ids=lambda row: row.name)
def test_what_iciia_adds_is_what_was_published(row: Published) -> None:
    for groups, published in ((1, row.b), (tiny_groups(row.width), row.t)):
        parameters, multiply_adds, one = added(row.width, groups)
        assert parameters == pytest.approx(published[0], rel=ROUNDED)
        assert multiply_adds == pytest.approx(published[1], rel=ROUNDED)
        assert one < multiply_adds


def test_a_backbone_is_counted_without_its_weights() -> None:
    row = TABLE_1[0]
    parameters, multiply_adds = backbone_cost(row.timm_name, row.side)
    assert parameters == pytest.approx(row.parameters, rel=ROUNDED)
    assert multiply_adds == pytest.approx(row.multiply_adds, rel=ROUNDED)
