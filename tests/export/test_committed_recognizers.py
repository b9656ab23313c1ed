"""The recognisers in models/: they open, stay small, and a device says what torch says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_server.training.iciia.learn import stream
from cloud_server.training.iciia.recognizer import Recognizer
from cloud_server.training.iciia.samples import by_client
from cloud_server.training.iciia.worlds import EMOJI_TEST, EmojiWorld
from cloud_server.training.starter.scenes import FONT_PATHS
from edge_agent.runtime.session import Session
from export.optimise import optimise
from export.quiet import quiet
from export.recognizer import NAMES, open_recognizer

ROOT = Path(__file__).parents[2] / "models/recognizer"
has_emoji = pytest.mark.skipif(
    not (EMOJI_TEST.is_file() and any(path.is_file() for path in FONT_PATHS)),
    reason="needs the Debian packages unicode-data and fonts-noto-color-emoji",
)


@pytest.mark.parametrize(("name", "classes"), [("emoji", 1377), ("omniglot", 242)])
def test_a_committed_recogniser_opens_and_is_small(name: str, classes: int) -> None:
    model = Recognizer.load(ROOT / name)
    assert len(model.classes) == len(set(model.classes)) == classes
    assert model.backbone.width == model.iciia.config.width == 256
    size = sum(file.stat().st_size for file in (ROOT / name).rglob("*") if file.is_file())
    assert size < 5e6


@pytest.mark.slow
@has_emoji
@pytest.mark.parametrize(("amount", "history"), [(10_000, 15)])
def test_the_device_names_emoji_as_torch_does(tmp_path: Path, amount: int, history: int) -> None:
    """The same top-1 of 10,000 pictures, plain and after history, logits within a thousandth."""
    source, parts = open_recognizer(ROOT / "emoji"), {}
    for name, _, load in source.parts:
        (tmp_path / name).mkdir()
        with quiet():
            load().trace(tmp_path / name / "traced.onnx")
        optimise(tmp_path / name / "traced.onnx", tmp_path / name / "model.onnx")
        parts[name] = Session(tmp_path / name / "model.onnx", optimized=True)
    backbone, head, adapted = (parts[NAMES[key]] for key in ("backbone", "head", "adapted"))
    model, samples = source.model, EmojiWorld().samples()
    test = samples.of("test")[:amount]
    found, wanted = [], []
    with torch.inference_mode():
        for indices in np.array_split(test, len(test) // 50):
            pictures = samples.draw(indices)
            found.append(backbone.run({"pictures": pictures})[0])
            wanted.append(model.backbone(torch.from_numpy(pictures)).numpy())
        ours, theirs = np.concatenate(found), np.concatenate(wanted)
        same(head.run({"features": ours[:64]})[0], model.plain(torch.from_numpy(theirs[:64])))
        logits = np.concatenate([head.run({"features": x})[0] for x in np.split(ours, 200)])
        same(logits, model.plain(torch.from_numpy(theirs)))
        clients = by_client(samples.clients["random"][test], np.arange(len(test)))
        met = stream(clients, history, 0)
        for target, before in zip(met.targets, met.before, strict=True):
            (got,) = adapted.run({"before": ours[before], "features": ours[target][None]})
            sequence = torch.from_numpy(theirs[np.append(before, target)])
            same(got, model.iciia(sequence)[-1:])


def same(got: np.ndarray, want: torch.Tensor) -> None:
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert (got.argmax(-1) == want.numpy().argmax(-1)).all()
