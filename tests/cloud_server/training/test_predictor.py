from __future__ import annotations

import warnings

import numpy as np
import onnxruntime
import torch

from cloud_server.training.predictor import Gate, Predictor, PredictorConfig

SMALL = PredictorConfig(width=16, experts=3, hidden=8, low_rank=4, top_k=2)


def build(config=SMALL):
    torch.manual_seed(0)
    return Predictor(config).eval()


def prompts(batch=4, tokens=7, width=16):
    torch.manual_seed(1)
    hidden = torch.randn(batch, tokens, width)
    mask = torch.zeros(batch, tokens)
    for row in range(batch):
        mask[row, 1 : 2 + row] = 1.0
    return hidden, mask


def test_it_predicts_one_distance_in_zero_to_one_per_metric():
    model = build()
    d = model(*prompts())
    assert d.shape == (4, 3)
    assert ((d > 0) & (d < 1)).all()


def test_special_tokens_and_padding_change_nothing():
    model = build()
    hidden, mask = prompts()
    disturbed = torch.where(mask[..., None] > 0, hidden, 100 * torch.randn_like(hidden))
    torch.testing.assert_close(model(disturbed, mask), model(hidden, mask))


def test_a_prompt_is_judged_alike_alone_and_in_a_batch():
    model = build()
    hidden, mask = prompts()
    together = model(hidden, mask)
    for row in range(len(hidden)):
        torch.testing.assert_close(
            model(hidden[row : row + 1], mask[row : row + 1])[0], together[row]
        )


def test_a_prompt_without_tokens_gets_the_bias_of_each_head():
    model = build()
    hidden, mask = prompts()
    d = model(hidden, torch.zeros_like(mask))
    torch.testing.assert_close(d, model.bias.sigmoid().expand(4, -1))


def test_every_expert_weighs_its_k_best_tokens_by_their_affinity():
    torch.manual_seed(0)
    gate = Gate(SMALL)
    tokens, mask = (
        torch.randn(2, 7, 16),
        torch.tensor([[0, 1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0]]),
    )
    weights = gate(tokens, mask.float())
    affinity = (tokens @ gate.embeddings.T).softmax(-1)
    assert ((weights[0] > 0).sum(0) == SMALL.top_k).all()
    best = affinity[0, 1:6].topk(SMALL.top_k, dim=0).values
    torch.testing.assert_close(weights[0].sort(dim=0, descending=True).values[: SMALL.top_k], best)
    assert (weights[1].nonzero()[:, 0] == 1).all(), "one token only, and it is the prompt's"


def test_both_gates_and_all_experts_learn():
    model = build().train()
    model(*prompts()).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_a_saved_predictor_is_the_same_predictor(tmp_path):
    model = build()
    model.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"predictor.safetensors", "config.json"}
    loaded = Predictor.load(tmp_path)
    assert loaded.config == SMALL
    torch.testing.assert_close(loaded(*prompts()), model(*prompts()), rtol=0, atol=0)


def test_the_exported_network_agrees_at_every_batch_size(tmp_path):
    model = build()
    hidden, mask = prompts(batch=2)
    file = tmp_path / "predictor.onnx"
    batch = torch.export.Dim("batch", min=1, max=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            model,
            (hidden, mask),
            file,
            input_names=["hidden", "mask"],
            output_names=["d"],
            dynamic_shapes={"hidden": {0: batch}, "mask": {0: batch}},
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(file)
    for size in (1, 3):
        hidden, mask = prompts(batch=size)
        (d,) = session.run(["d"], {"hidden": hidden.numpy(), "mask": mask.numpy()})
        np.testing.assert_allclose(d, model(hidden, mask).detach().numpy(), atol=1e-5)


def test_the_config_survives_json():
    assert PredictorConfig.from_json(SMALL.to_json()) == SMALL
