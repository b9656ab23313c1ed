from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from cloud_server.training import predictor
from cloud_server.training.predictor import (
    LinearPredictor,
    MixedPredictor,
    Predictor,
    PredictorConfig,
)

SMALL = PredictorConfig(width=16, experts=3, hidden=8, low_rank=4, top_k=2)


LINEAR = PredictorConfig(width=16, experts=3, kind="linear")
SEVERAL = replace(SMALL, members=3)
MIXED = replace(SEVERAL, kind="mixed")
ALONE = replace(SMALL, single_gate=True, all_tokens=True, single_metric=True)
EVERY = {
    "full": SMALL,
    "linear": LINEAR,
    "several": SEVERAL,
    "mixed": MIXED,
    "single gate": replace(SMALL, single_gate=True),
    "all tokens": replace(SMALL, all_tokens=True),
    "single metric": replace(SMALL, single_metric=True),
    "none of the three": ALONE,
}
every = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)


def build(config=SMALL):
    torch.manual_seed(0)
    model = predictor.build(config).eval()
    for module in model.modules():
        if isinstance(module, LinearPredictor):
            torch.nn.init.normal_(module.weight)
    return model


def prompts(batch=4, tokens=7, width=16):
    torch.manual_seed(1)
    hidden = torch.randn(batch, tokens, width)
    mask = torch.zeros(batch, tokens)
    for row in range(batch):
        mask[row, 1 : 2 + row] = 1.0
    return hidden, mask


@every
def test_it_predicts_one_distance_in_zero_to_one_per_metric(config):
    model = build(config)
    d = model(*prompts())
    assert d.shape == (4, 3)
    assert ((d > 0) & (d < 1)).all()


@every
def test_special_tokens_and_padding_change_nothing(config):
    model = build(config)
    hidden, mask = prompts()
    disturbed = torch.where(mask[..., None] > 0, hidden, 100 * torch.randn_like(hidden))
    torch.testing.assert_close(model(disturbed, mask), model(hidden, mask))


@every
def test_a_prompt_is_judged_alike_alone_and_in_a_batch(config):
    model = build(config)
    hidden, mask = prompts()
    together = model(hidden, mask)
    for row in range(len(hidden)):
        torch.testing.assert_close(
            model(hidden[row : row + 1], mask[row : row + 1])[0], together[row]
        )


@every
def test_a_prompt_without_tokens_gets_the_bias_of_each_head(config):
    model = build(config)
    hidden, mask = prompts()
    d = model(hidden, torch.zeros_like(mask))
    if config.kind == "mixed":
        said = torch.cat([model.gated.bias, model.linear.bias[None]]).sigmoid()
        expected = said.mean(0)
    elif config.kind == "linear":
        expected = model.bias.sigmoid()
    else:
        expected = model.bias.sigmoid().mean(0)
    torch.testing.assert_close(d, expected.expand(4, 3))


def test_every_expert_weighs_its_k_best_tokens_by_their_affinity():
    torch.manual_seed(0)
    model = build()
    tokens, mask = (
        torch.randn(2, 7, 16),
        torch.tensor([[0, 1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0]]),
    )
    weights = model.gate(tokens, mask.float())[:, :, 0, 0]
    affinity = (tokens @ model.gates[:, 0, 0]).softmax(-1)
    assert ((weights[0] > 0).sum(0) == SMALL.top_k).all()
    best = affinity[0, 1:6].topk(SMALL.top_k, dim=0).values
    torch.testing.assert_close(weights[0].sort(dim=0, descending=True).values[: SMALL.top_k], best)
    assert (weights[1].nonzero()[:, 0] == 1).all(), "one token only, and it is the prompt's"


@every
def test_every_part_learns(config):
    model = build(config).train()
    model(*prompts()).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("config", [SMALL, LINEAR, MIXED, ALONE])
def test_a_saved_predictor_is_the_same_predictor(tmp_path, config):
    model = build(config).half().float()
    predictor.save(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"predictor.safetensors", "config.json"}
    loaded = predictor.load(tmp_path)
    assert loaded.config == config
    torch.testing.assert_close(loaded(*prompts()), model(*prompts()), rtol=0, atol=0)


@pytest.mark.parametrize("config", [SMALL, LINEAR, MIXED, ALONE])
def test_the_exported_network_agrees_at_every_size(tmp_path, config):
    model = build(config)
    hidden, mask = prompts(batch=2)
    file = tmp_path / "predictor.onnx"
    batch = torch.export.Dim("batch", min=1, max=1024)
    length = torch.export.Dim("length", min=2, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            model,
            (hidden, mask),
            file,
            input_names=["hidden", "mask"],
            output_names=["d"],
            dynamic_shapes={"hidden": {0: batch, 1: length}, "mask": {0: batch, 1: length}},
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(file)
    for size, tokens in ((1, 7), (3, 5), (1, 2)):
        hidden, mask = prompts(size, tokens)
        (d,) = session.run(["d"], {"hidden": hidden.numpy(), "mask": mask.numpy()})
        np.testing.assert_allclose(d, model(hidden, mask).detach().numpy(), atol=1e-5)


def test_without_token_selection_every_word_reaches_every_expert():
    hidden, mask = prompts()
    weights = build(EVERY["all tokens"]).gate(hidden, mask)
    assert ((weights > 0).all(-1).all(-1).all(-1) == (mask > 0)).all()


def test_an_expert_alone_still_chooses_among_tokens():
    torch.manual_seed(0)
    alone = build(EVERY["single metric"])
    weights = alone.gate(torch.randn(2, 7, 16), torch.ones(2, 7))
    assert ((weights > 0).sum(1) == SMALL.top_k).all()


def test_a_single_gate_has_no_negative_side():
    model = build(EVERY["single gate"])
    assert model.gates.shape == (16, 1, 1, 3)
    assert model.project.shape == (16, 1, 1, 3, 4)
    assert (model.gate(*prompts()) >= 0).all()


def test_what_counts_against_a_token_is_taken_away():
    model = build()
    with torch.no_grad():
        model.gates[:, :, 1] = model.gates[:, :, 0]
        model.project[:, :, 1] = model.project[:, :, 0]
    expected = model.bias.sigmoid().expand(4, 3)
    torch.testing.assert_close(model(*prompts()), expected, msg="no contrast is left")


def test_joined_predictors_say_what_they_say_in_the_mean():
    several = []
    for seed in range(3):
        torch.manual_seed(seed)
        several.append(Predictor(SMALL).eval())
    joined = Predictor.joined(several)
    assert joined.config == SEVERAL
    mean = torch.stack([model(*prompts()) for model in several]).mean(0)
    torch.testing.assert_close(joined(*prompts()), mean)


def test_in_a_mixed_one_every_network_counts_alike():
    model = build(MIXED)
    assert isinstance(model, MixedPredictor)
    members = MIXED.members
    mean = (members * model.gated(*prompts()) + model.linear(*prompts())) / (members + 1)
    torch.testing.assert_close(model(*prompts()), mean)


def test_a_single_metric_gives_every_metric_the_same_answer():
    d = build(EVERY["single metric"])(*prompts())
    assert (d == d[:, :1]).all()
    assert len(d[:, 0].unique()) == len(d)


def test_the_linear_one_weighs_the_mean_token_the_last_one_and_the_length():
    model = LinearPredictor(PredictorConfig(width=1, experts=1, kind="linear"))
    model.load_state_dict({"weight": torch.tensor([[2.0, 5.0, 3.0]]), "bias": torch.tensor([0.5])})
    hidden, mask = torch.tensor([[[9.0], [1.0], [-0.5], [9.0]]]), torch.tensor([[0.0, 1, 1, 0]])
    want = torch.tensor(2.0 * 0.25 + 5.0 * -0.5 + 3.0 * np.log(2.0) + 0.5).sigmoid()
    torch.testing.assert_close(model(hidden, mask), want.reshape(1, 1).float())


@pytest.mark.parametrize("width", [192, 768, 4096])
def test_it_stays_below_ten_million_parameters_for_encoders_of_any_width(width):
    model = Predictor(PredictorConfig(width=width, experts=11))
    assert sum(weight.numel() for weight in model.parameters()) < 10e6


def test_the_config_survives_json():
    assert PredictorConfig.from_json(SMALL.to_json()) == SMALL
