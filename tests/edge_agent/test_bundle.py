"""A bundle opens when it is what was exported, and says what is wrong when it is not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.bundle import Loss, open_bundle
from edge_agent.errors import BundleError

Rewrite = Callable[[Path, Callable[[dict[str, Any]], None]], None]


def test_opens_with_typed_parts(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert bundle.path_of("unet") == tiny_bundle / "unet" / "model.onnx"
    assert bundle.diffusion.scheduler["_class_name"] == "DPMSolverMultistepScheduler"
    assert [metric.name for metric in bundle.router.metrics] == [
        "Definition",
        "Sharpness",
        "Layout",
    ]
    assert list(bundle.tokenizers) == ["text_encoder"]


def test_opens_by_a_name_too(tiny_bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "verified.json"
    assert open_bundle(str(tiny_bundle), cache_path=str(cache)) == open_bundle(tiny_bundle)
    assert cache.is_file()


def test_a_missing_bundle_names_the_folder_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle at .*nowhere; run `python -m export`"):
        open_bundle(tmp_path / "nowhere")


def test_a_half_written_bundle_says_so(tmp_path: Path) -> None:
    (tmp_path / "bundle.partial").mkdir()
    with pytest.raises(BundleError, match="only half written; run `python -m export` again"):
        open_bundle(tmp_path / "bundle")


def test_a_truncated_manifest_is_named(tiny_bundle: Path) -> None:
    manifest = tiny_bundle / "bundle.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    with pytest.raises(BundleError, match=r"bundle\.json is not valid JSON.*python -m export"):
        open_bundle(tiny_bundle)


def test_a_newer_format_asks_for_an_upgrade(tiny_bundle: Path, rewrite: Rewrite) -> None:
    rewrite(tiny_bundle, lambda content: content.update(format=3, components={}))
    with pytest.raises(BundleError, match=r"format 3, made by a newer version.*upgrade"):
        open_bundle(tiny_bundle)


def test_an_older_format_asks_for_an_export(tiny_bundle: Path, rewrite: Rewrite) -> None:
    rewrite(tiny_bundle, lambda content: content.update(format=1))
    with pytest.raises(BundleError, match=r"format 1, made by an older .* `python -m export`"):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize("version", [None, "1", 0])
def test_a_strange_format_is_refused(tiny_bundle: Path, rewrite: Rewrite, version: object) -> None:
    rewrite(tiny_bundle, lambda content: content.update(format=version))
    with pytest.raises(BundleError, match="not a bundle manifest"):
        open_bundle(tiny_bundle)


def _without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("diffusion", "steps"), "'diffusion.steps' .expected int"),
        (_without("components", "unet"), "no component 'unet'"),
        (_without("components", "unet", "parity", "gate"), "'components.unet.parity.gate'"),
        (_without("router", "metrics"), "'router.metrics'"),
        (
            lambda content: content["diffusion"].update(text_states="last"),
            "'diffusion.text_states' .expected hidden or penultimate",
        ),
        (_without("tokenizers", "text_encoder"), "'tokenizers.text_encoder.'"),
        (lambda content: content["router"]["metrics"].append(3), r"'router.metrics\[3\].'"),
        (lambda content: content["router"]["score_digest"].append("x"), "score_digest.200'"),
        (lambda content: content["router"]["score_digest"].clear(), "score_digest' .expected scor"),
        (
            lambda content: content["router"]["score_digest"].append(-1.0),
            "'router.score_digest' .expected scores that rise",
        ),
        (
            lambda content: content["router"]["metrics"][0].update(weight=5),
            "'router.metrics' .expected one or more, of weights that add up to 1",
        ),
        (
            lambda content: content["router"].update(default_share=1.5),
            "'router.default_share' .expected a share from 0 to 1",
        ),
        (lambda content: content["diffusion"].update(steps=0), "'diffusion.steps' .expected a num"),
        (lambda content: content["diffusion"].update(vae_scale=0), "'diffusion.vae_scale'"),
        (lambda content: content["diffusion"].update(scaling_factor=0), "other than 0"),
        (lambda content: content["diffusion"].update(text_encoders=[]), "one name or more"),
        (
            lambda content: content["tokenizers"]["text_encoder"].update(file="../../etc/passwd"),
            "outside the bundle",
        ),
    ],
)
def test_a_wrong_field_is_named_by_its_path(
    tiny_bundle: Path,
    rewrite: Rewrite,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    rewrite(tiny_bundle, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": 0}, "'critic.side' .expected a number of pixels"),
        ({"squashed": 1}, "'critic.squashed' .expected bool"),
        ({"score_digest": [0.4, 0.3]}, "'critic.score_digest' .expected scores that rise"),
        ({"network": "looker"}, "no component 'looker'"),
        ({"text_encoder": "vae_decoder"}, "'tokenizers.vae_decoder.'"),
        ({"text_encoder": None}, "'critic.text_encoder' .expected str"),
    ],
)
def test_a_wrong_critic_is_named(
    tiny_bundle: Path,
    hire_critic: Callable[[Path, float], None],
    rewrite: Rewrite,
    change: dict[str, Any],
    message: str,
) -> None:
    hire_critic(tiny_bundle, 0.5)
    assert open_bundle(tiny_bundle).critic is not None
    rewrite(tiny_bundle, lambda content: content["critic"].update(change))
    with pytest.raises(BundleError, match=message):
        open_bundle(tiny_bundle)


def test_a_missing_file_is_named(tiny_bundle: Path) -> None:
    (tiny_bundle / "unet" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"lacks .*unet.model\.onnx"):
        open_bundle(tiny_bundle)


def test_a_shortened_file_is_named_with_both_sizes(tiny_bundle: Path) -> None:
    file = tiny_bundle / "unet" / "model.onnx"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BundleError, match=rf"has {size - 10} bytes .* promises {size}"):
        open_bundle(tiny_bundle, verify=False)


def _flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 0xFF
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["unet/model.onnx", "tokenizer.json"])
def test_a_changed_byte_fails_the_digest_even_after_a_good_opening(
    tiny_bundle: Path, name: str
) -> None:
    open_bundle(tiny_bundle)
    file = tiny_bundle / name
    before = file.stat().st_mtime_ns
    _flip_a_byte(file)
    os.utime(file, ns=(before + 1_000_000, before + 1_000_000))
    with pytest.raises(BundleError, match=rf"{file.name} is not what was exported"):
        open_bundle(tiny_bundle)
    assert open_bundle(tiny_bundle, verify=False).format == 2


def test_a_file_that_cannot_be_read_is_named(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fail)
    with pytest.raises(BundleError, match=r"model\.onnx cannot be read \(Input/output error\)"):
        open_bundle(tiny_bundle)


def test_digests_are_remembered_while_size_and_time_hold(tiny_bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "verified.json"
    open_bundle(tiny_bundle, cache_path=cache)
    seals = json.loads(cache.read_text())
    assert len(seals) == 5
    written = cache.stat().st_mtime_ns
    open_bundle(tiny_bundle, cache_path=cache)
    assert cache.stat().st_mtime_ns == written


@pytest.mark.parametrize("content", ["", "[]", '{"x": 3}'])
def test_a_damaged_cache_only_costs_time(tiny_bundle: Path, tmp_path: Path, content: str) -> None:
    cache = tmp_path / "verified.json"
    cache.write_text(content)
    assert open_bundle(tiny_bundle, cache_path=cache).format == 2


def test_a_cache_that_cannot_be_written_does_not_stop_us(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert open_bundle(tiny_bundle, cache_path=tmp_path / "file" / "verified.json").format == 2


def lose(content: dict[str, Any], **changes: Any) -> None:
    loss = {"psnr_db": 38.0, "picture_psnr_db": 33, "flips": None, "accepted": True}
    content["components"]["unet"]["loss"] = loss | changes


def test_what_a_precision_cost_is_read(tiny_bundle: Path, rewrite: Rewrite) -> None:
    assert open_bundle(tiny_bundle).components["unet"].loss is None
    rewrite(tiny_bundle, lose)
    bundle = open_bundle(tiny_bundle)
    assert bundle.components["unet"].loss == Loss(38.0, 33.0, None, True)
    assert str(bundle.components["unet"].loss) == "outputs 38.0 dB, pictures 33.0 dB (accepted)"
    assert bundle.loss is None


def test_a_loss_that_is_no_number_is_named(tiny_bundle: Path, rewrite: Rewrite) -> None:
    rewrite(tiny_bundle, lambda content: lose(content, psnr_db="much"))
    with pytest.raises(BundleError, match=r"'components\.unet\.loss\.psnr_db' \(expected float\)"):
        open_bundle(tiny_bundle)
