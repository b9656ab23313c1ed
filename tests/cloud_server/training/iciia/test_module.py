"""The module against the paper's formulas, torch's own encoder layer and real counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cloud_server.errors import ConfigError
from cloud_server.training.iciia.module import (
    Attention,
    GroupedLinear,
    Iciia,
    IciiaConfig,
    Layer,
    tiny_groups,
)

SIZES = [(1, 64), (4, 64), (16, 64), (32, 64)]


def made(**settings: object) -> Iciia:
    torch.manual_seed(0)
    return Iciia(IciiaConfig(**{"width": 64, "classes": 10, **settings})).eval()


@pytest.mark.parametrize(("groups", "width"), SIZES)
def test_a_grouped_projection_is_its_index_form(groups: int, width: int) -> None:
    torch.manual_seed(0)
    layer, m = GroupedLinear(width, groups), width // groups
    x = torch.randn(3, width)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    want = np.zeros((3, width), np.float32)
    for b in range(3):
        for o in range(m):
            for p in range(groups):
                inside = sum(weight[p, o, i] * x[b, p * m + i].item() for i in range(m))
                want[b, o * groups + p] = inside + bias[o * groups + p]
    np.testing.assert_allclose(layer(x).detach().numpy(), want, atol=1e-5)


def test_without_the_shuffle_a_group_sees_only_itself() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 64)
    changed = x.clone()
    changed[:, :4] += 1  # the first of sixteen groups
    for shuffle, touched in ((False, set(range(4))), (True, set(range(0, 64, 16)))):
        layer = GroupedLinear(64, 16, shuffle=shuffle)
        moved = (layer(changed) - layer(x)).abs()[0] > 1e-6
        assert set(moved.nonzero().flatten().tolist()) == touched


@pytest.mark.parametrize(
    ("groups", "shuffle"), [(1, True), (2, True), (4, True), (8, True), (16, False)]
)
def test_two_halves_of_the_identity_undo_their_shuffles(groups: int, shuffle: bool) -> None:
    first, second = (GroupedLinear(64, groups, shuffle=shuffle) for _ in range(2))
    assert first.can_undo
    first.undo()
    second.undo(0.3)
    x = torch.randn(5, 64)
    torch.testing.assert_close(second(first(x)), 0.3 * x)


def test_groups_too_small_to_undo_their_shuffles_say_so() -> None:
    assert not GroupedLinear(64, 16).can_undo


@pytest.mark.parametrize("groups", [1, 16])
def test_the_order_of_pictures_plays_no_part(groups: int) -> None:
    model, x = made(groups=groups), torch.randn(7, 64)
    order = torch.randperm(7)
    torch.testing.assert_close(model(x)[order], model(x[order]), atol=1e-5, rtol=1e-5)


def test_a_convolution_does_see_the_order() -> None:
    model, x = made(mixing="convolution"), torch.randn(7, 64)
    assert (model(x).flip(0) - model(x.flip(0))).abs().max() > 1e-3


def test_one_group_is_torchs_encoder_layer() -> None:
    torch.manual_seed(0)
    ours = Layer(IciiaConfig(width=64, classes=10)).eval()
    theirs = nn.TransformerEncoderLayer(64, 4, dim_feedforward=64, batch_first=True).eval()
    attention = ours.mix
    assert isinstance(attention, Attention)
    three = (attention.q, attention.k, attention.v)
    pairs = {
        theirs.self_attn.in_proj_weight: torch.cat([p.weight[0] for p in three]),
        theirs.self_attn.in_proj_bias: torch.cat([p.bias for p in three]),
        theirs.self_attn.out_proj.weight: attention.out.weight[0],
        theirs.self_attn.out_proj.bias: attention.out.bias,
        theirs.linear1.weight: ours.mlp1.weight[0],
        theirs.linear1.bias: ours.mlp1.bias,
        theirs.linear2.weight: ours.mlp2.weight[0],
        theirs.linear2.bias: ours.mlp2.bias,
    }
    with torch.no_grad():
        for one, other in pairs.items():
            one.copy_(other)
    x = torch.randn(2, 9, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixing", ["attention", "convolution", "none"])
@pytest.mark.parametrize("layers", [1, 3])
def test_rows_asked_for_alone_are_the_rows_of_all(mixing: str, layers: int) -> None:
    model, x = made(mixing=mixing, layers=layers, groups=8), torch.randn(5, 64)
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(model(x, rows), model(x)[rows], atol=1e-5, rtol=1e-5)


def test_a_module_begins_close_to_its_backbone() -> None:
    torch.manual_seed(1)
    classifier, features = nn.Linear(64, 10), torch.randn(200, 64).relu()
    model = made(groups=8)
    model.begin_as(classifier, features)
    with torch.inference_mode():
        plain = classifier(features).argmax(-1)
        alone = model(features[:, None]).squeeze(1).argmax(-1)
        together = model(features.view(20, 10, 64)).flatten(0, 1).argmax(-1)
    assert (alone == plain).float().mean() > 0.8
    assert (together == plain).float().mean() > 0.8


def test_clients_side_by_side_do_not_mix() -> None:
    model, x = made(groups=8), torch.randn(3, 6, 64)
    torch.testing.assert_close(model(x)[1], model(x[1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("groups", "width"), SIZES)
def test_the_parameter_formula_counts_what_is_there(groups: int, width: int, layers: int) -> None:
    model = made(groups=groups, width=width, layers=layers)
    norms_and_head = 4 * width * layers + width * 10 + 10
    counted = sum(weight.numel() for weight in model.parameters())
    assert counted == model.config.projection_parameters + norms_and_head


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("groups", "width"), SIZES)
def test_the_cost_formulas_count_what_is_done(groups: int, width: int, layers: int) -> None:
    model, pictures = made(groups=groups, width=width, layers=layers), 16
    x = torch.randn(pictures, width)
    for rows, formula in (
        (None, model.config.multiply_adds(pictures)),
        (torch.tensor([15]), model.config.multiply_adds_of_one(pictures)),
    ):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(x, rows)
        head = (pictures if rows is None else 1) * width * 10
        assert counter.get_total_flops() == 2 * (formula + head)  # two operations, one add


@pytest.mark.parametrize(
    ("width", "groups"),
    [(1280, 256), (2048, 256), (1792, 256), (1000, 250), (256, 128), (97, 1), (1, 1)],
)
def test_the_tiny_form_takes_256_groups_or_the_most_that_mix(width: int, groups: int) -> None:
    assert tiny_groups(width) == groups


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="groups is 7, which does not divide the width 64"):
        IciiaConfig(width=64, classes=10, groups=7)
