"""A recogniser in the bundle: the same answers as torch, all that the device needs, kept parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_server.training.iciia.recognizer import Recognizer
from edge_agent.bundle import open_bundle
from edge_agent.runtime.session import Session
from export.build import Job, export_bundle
from export.components import Network
from export.errors import ExportError
from export.files import digest_of
from export.optimise import optimise
from export.quiet import quiet
from export.recognizer import open_recognizer
from tests import tiny


@pytest.fixture
def with_recognizer(copied: Job, tmp_path: Path) -> Job:
    folder = tiny.make_recognizer(tmp_path / "recognizer")
    return replace(copied, recognizer=open_recognizer(folder))


def test_the_device_answers_as_torch_does(tmp_path: Path) -> None:
    source = open_recognizer(tiny.make_recognizer(tmp_path / "recognizer"))
    backbone, head, adapted = (traced(load(), tmp_path / name) for name, _, load in source.parts)
    model, rng = source.model, np.random.default_rng(3)
    pictures = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    (features,) = backbone.run({"pictures": pictures})
    with torch.inference_mode():
        x = torch.from_numpy(features)
        np.testing.assert_allclose(features, model.backbone(torch.from_numpy(pictures)), atol=1e-4)
        np.testing.assert_allclose(head.run({"features": features})[0], model.plain(x), atol=1e-4)
        for earlier, new in ((1, 1), (15, 1), (4, 16), (0, 13), (0, 1)):
            before, now = features[:earlier], features[earlier : earlier + new]
            (got,) = adapted.run({"before": before, "features": now})
            want = model.iciia(x[: earlier + new])[earlier:]
            np.testing.assert_allclose(got, want, atol=1e-4)


def traced(network: Network, folder: Path) -> Session:
    """Trace and optimise a network as an export does, and open it as the device does."""
    folder.mkdir()
    with quiet():
        network.trace(folder / "traced.onnx")
    optimise(folder / "traced.onnx", folder / "model.onnx")
    return Session(folder / "model.onnx", optimized=True)


def test_the_manifest_says_how_pictures_are_read_and_who_made_features(
    with_recognizer: Job,
) -> None:
    path, rows = export_bundle(with_recognizer)
    assert [row.kept for row in rows] == [True] * 4 + [False] * 3
    spec = open_bundle(path).recognizer
    assert spec is not None
    assert (spec.side, spec.crop, spec.width) == (32, 1.0, 32)
    assert (spec.history, spec.least_history) == (15, 1)
    assert spec.classes == tuple(f"class {i}" for i in range(7))
    assert spec.digest == digest_of(with_recognizer.recognizer.folder / "backbone")


def test_another_module_on_the_same_backbone_keeps_the_backbone(
    with_recognizer: Job, tmp_path: Path
) -> None:
    before = open_bundle(export_bundle(with_recognizer)[0])
    folder = with_recognizer.recognizer.folder
    changed = Recognizer.load(folder)
    with torch.no_grad():
        changed.iciia.head.bias.add_(1.0)
    changed.save(folder)
    _, rows = export_bundle(replace(with_recognizer, recognizer=open_recognizer(folder)))
    assert [row.kept for row in rows] == [True] * 6 + [False]
    after = open_bundle(with_recognizer.out)
    assert after.recognizer.digest == before.recognizer.digest


def test_a_bundle_without_a_recogniser_opens_as_before(copied: Job) -> None:
    assert open_bundle(copied.out).recognizer is None


def test_a_folder_that_is_no_recogniser_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is no usable recogniser .* train-recognizer wrote"):
        open_recognizer(tmp_path)
