"""Manifests read or refused in words; clients dealt anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cloud_server.errors import ModelError
from cloud_server.training.iciia.samples import by_client, mixed_clients, read_manifest


def test_a_manifest_gives_pictures_labels_and_clients(manifest: Path) -> None:
    samples = read_manifest(manifest, 16)
    assert samples.classes == ("colour 0", "colour 1", "colour 2", "colour 3")
    assert [len(samples.of(split)) for split in ("train", "val", "test")] == [48, 24, 24]
    assert samples.labels[:5].tolist() == [0, 1, 2, 3, 0]
    assert samples.clients["manifest"][:5].tolist() == [0, 0, 1, 1, 0]
    red, green = samples.draw(np.array([0, 1]))
    assert red.shape == (16, 16, 3)
    assert red[..., 0].mean() > 200 > 60 > red[..., 1].mean()
    assert green[..., 1].mean() > 180


def test_lessons_repeat_by_step_and_come_from_training_pictures(manifest: Path) -> None:
    samples = read_manifest(manifest, 16)
    (a, labels), (b, again), (c, _) = (samples.lesson(step, 8) for step in (3, 3, 4))
    assert (a == b).all()
    assert (labels == again).all()
    assert not (a == c).all()


def test_a_backbone_learns_from_the_lines_that_are_lessons_where_there_are_some(
    manifest: Path,
) -> None:
    lines = manifest.read_text().splitlines()
    lines[1] = lines[1].replace(",train", ",lesson")
    manifest.write_text("\n".join(lines))
    samples = read_manifest(manifest, 16)
    _, labels = samples.lesson(0, 8)
    assert labels.tolist() == [0] * 8
    assert len(samples.of("train")) == 47


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("image,label,client,split", "image,label,client", "has no column 'split'"),
        ("pictures/5.png", "", "line 7 .* has no image"),
        ("client 0,test", "client 0,tset", "has the split 'tset'; write train, val, test, lesson"),
        ("pictures/5.png", "/etc/5.png", "which lies outside the manifest's folder"),
        (",val", ",test", "has no line of split 'val'"),
        ("pictures/5.png", "pictures/no.png", "line 7 .* names 'pictures/no.png', and there is"),
        ("pictures/5.png,", "\n\npictures/no.png,", "line 9 .* names 'pictures/no.png'"),
    ],
)
def test_a_wrong_manifest_is_refused_in_words(
    manifest: Path, before: str, after: str, words: str
) -> None:
    manifest.write_text(manifest.read_text().replace(before, after))
    with pytest.raises(ModelError, match=words):
        read_manifest(manifest, 16)


def test_a_label_may_hold_any_character(manifest: Path) -> None:
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace("colour 3", "a\u2028b"), encoding="utf-8")
    assert "a\u2028b" in read_manifest(manifest, 16).classes


def test_other_pictures_of_the_same_names_are_other_samples(manifest: Path) -> None:
    before = read_manifest(manifest, 16).digest
    assert read_manifest(manifest, 16).digest == before
    (manifest.parent / "pictures/3.png").write_bytes(b"another")
    assert read_manifest(manifest, 16).digest != before


def test_a_damaged_picture_names_its_file_and_what_to_do(manifest: Path) -> None:
    file = manifest.parent / "pictures/2.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ModelError, match=r"2\.png cannot be read .* take its line out"):
        read_manifest(manifest, 16).draw(np.array([2]))


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_mixing_keeps_the_sizes_of_clients_and_a_share_of_their_pictures(level: float) -> None:
    clients = np.repeat(np.arange(10), 200)
    splits = np.tile(np.array([0, 1], np.int8), 1000)
    mixed = mixed_clients(clients, splits, level, seed=0)
    for split in (0, 1):
        here = splits == split
        assert (np.bincount(mixed[here]) == np.bincount(clients[here])).all()
    assert (mixed == clients).mean() == pytest.approx(level + (1 - level) / 10, abs=0.04)


def test_grouping_by_client_loses_nothing() -> None:
    clients = np.array([4, 1, 4, 2, 1, 4])
    groups = by_client(clients, np.array([0, 1, 2, 4, 5]))
    assert [group.tolist() for group in groups] == [[1, 4], [0, 2, 5]]
