"""Backbones saved and opened again, their features cached by what made them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cloud_server.errors import ModelError
from cloud_server.training.iciia.backbone import (
    Backbone,
    features_of,
    open_backbone,
    small_network,
    train_backbone,
)
from cloud_server.training.iciia.samples import Ints, read_manifest
from cloud_server.training.loop import Budget
from edge_agent.recognition.pictures import Pixels


def test_a_saved_backbone_opens_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Backbone(small_network(7, 32).eval()).save(tmp_path / "a")
    one = open_backbone(str(tmp_path / "a"))
    assert (one.side, one.crop, one.width, one.classifier.out_features) == (32, 1.0, 256, 7)
    one.save(tmp_path / "b")  # half precision already: nothing more is lost
    other = open_backbone(str(tmp_path / "b"))
    assert one.digest == other.digest
    pictures = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(one(pictures), other(pictures))


def test_timm_finds_its_own_models_in_the_folder(tmp_path: Path) -> None:
    import timm

    Backbone(small_network(7, 32).eval()).save(tmp_path)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert network.num_classes == 7
    assert network.pretrained_cfg["input_size"] == (3, 32, 32)


def test_what_is_no_backbone_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'nonsense' is neither a backbone's folder nor a model"):
        open_backbone("nonsense")
    Backbone(small_network(7, 32).eval()).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="cannot be opened"):
        open_backbone(str(tmp_path))


def test_features_are_made_once_for_a_backbone_and_its_pictures(
    manifest: Path, tmp_path: Path
) -> None:
    samples = read_manifest(manifest, 32)
    torch.manual_seed(0)
    backbone = Backbone(small_network(4, 32).eval())
    made = features_of(backbone, samples, tmp_path / "work", "cpu")
    assert made.shape == (96, 256)
    never = replace(samples, draw=lambda _: pytest.fail("drawn again"))
    assert (features_of(backbone, never, tmp_path / "work", "cpu") == made).all()
    with torch.no_grad():
        backbone.network.conv1[0].weight.mul_(1.1)
    assert not (features_of(backbone, samples, tmp_path / "work", "cpu") == made).all()


def test_features_that_a_killed_run_made_are_not_made_again(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_server.training.iciia.backbone.PART", 32)
    samples = read_manifest(manifest, 32)
    torch.manual_seed(0)
    backbone = Backbone(small_network(4, 32).eval())
    whole = features_of(backbone, samples, tmp_path / "whole", "cpu")
    drawn: list[int] = []

    def draw(indices: Ints) -> Pixels:
        if len(drawn) == 1:
            drawn.append(-1)
            raise KeyboardInterrupt
        drawn.append(int(indices[0]))
        return samples.draw(indices)

    killed = replace(samples, draw=draw)
    with pytest.raises(KeyboardInterrupt):
        features_of(backbone, killed, tmp_path / "work", "cpu")
    assert [file.suffix for file in (tmp_path / "work").iterdir()] == [".partial"]
    assert (features_of(backbone, killed, tmp_path / "work", "cpu") == whole).all()
    assert drawn == [0, -1, 32, 64]
    assert [file.suffix for file in (tmp_path / "work").iterdir()] == [".npy"]


def test_a_small_backbone_learns_from_lessons(manifest: Path, tmp_path: Path) -> None:
    samples = read_manifest(manifest, 32)
    budget = Budget(steps=12)
    model = train_backbone(samples, tmp_path / "work", budget, 0, "cpu")
    features = torch.from_numpy(features_of(model, samples, tmp_path / "work", "cpu"))
    with torch.inference_mode():
        assert model.classifier(features).shape == (96, 4)
    assert np.isfinite(features.numpy()).all()
    (saved,) = (file for file in (tmp_path / "work").iterdir() if file.is_dir())
    assert open_backbone(str(saved)).digest == model.digest


def test_a_backbone_of_other_pictures_is_not_gone_on_with(manifest: Path, tmp_path: Path) -> None:
    def trained(classes: int) -> str:
        samples = read_manifest(manifest, 32)
        assert len(samples.classes) == classes
        return train_backbone(samples, tmp_path / "work", Budget(steps=1), 0, "cpu").digest

    first = trained(4)
    assert trained(4) == first
    manifest.write_text(manifest.read_text().replace("colour 3", "colour 2"))
    assert trained(3) != first
    manifest.write_text(manifest.read_text().replace("colour 2", "colour 1"))
    assert trained(2) != first


FAMILIES = {
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1)},
    "convnext_atto": {"dims": (16, 24, 32, 40), "depths": (1, 1, 1, 1)},
    "resnet18": {"layers": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_timm_gives_features_and_keeps_its_answers(
    name: str, tmp_path: Path
) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=5, **FAMILIES[name]).eval()
    backbone = Backbone(network)
    backbone.round_as_saved()
    pictures = torch.randint(256, (2, backbone.side, backbone.side, 3), dtype=torch.uint8)
    inputs = (pictures.permute(0, 3, 1, 2).float() - backbone.mean) / backbone.std
    with torch.inference_mode():
        features = backbone(pictures)
        assert features.shape == (2, backbone.width)
        torch.testing.assert_close(backbone.classifier(features), network(inputs))
    backbone.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for key, weight in network.state_dict().items():
        assert torch.equal(weights[key].float(), weight.float()), "it is measured as it is shipped"


def test_weights_that_half_precision_cannot_hold_are_refused() -> None:
    backbone = Backbone(small_network(4, 32))
    backbone.network.bn1.running_var.fill_(1e6)
    with pytest.raises(ModelError, match=r"bn1\.running_var has values beyond half precision"):
        backbone.round_as_saved()
