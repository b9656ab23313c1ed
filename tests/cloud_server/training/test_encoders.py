from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cloud_server.errors import ModelError
from cloud_server.training.encoders import open_encoder
from cloud_server.training.towers import HuggingFaceTower
from tests import tiny

PROMPTS = ["a cat", "", "two red apples on the beach", "a " * 60, "a dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    tiny.make_pipeline(root / "pipeline")
    return {
        "pipeline": root / "pipeline",
        "open_clip": tiny.make_clip(root / "open_clip"),
        "bert": tiny.make_bert(root / "bert"),
        "t5": tiny.make_t5(root / "t5"),
    }


CONTEXTS = {"pipeline": 32, "open_clip": 32, "bert": 20, "t5": 20}
FRAMES = {"pipeline": (1, 1), "open_clip": (1, 1), "bert": (1, 1), "t5": (0, 1)}
every = pytest.mark.parametrize("kind", CONTEXTS)


@every
def test_masks_cover_the_prompt_and_its_end_and_no_padding(folders, kind):
    encoder = open_encoder(folders[kind])
    features = encoder.encode(PROMPTS)
    before, after = FRAMES[kind]
    fits = CONTEXTS[kind] - before - after
    assert encoder.context_length == CONTEXTS[kind]
    assert features.mask.sum(1).tolist() == [words + after for words in (2, 0, 6, fits, 2)]
    for row in features.mask:
        words = row.nonzero()[:, 0]
        assert len(words) == 0 or words.tolist() == list(range(before, before + len(words)))


@every
def test_a_prompt_has_the_same_states_alone_and_among_others(folders, kind):
    encoder = open_encoder(folders[kind])
    together = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        words = together.mask[row] > 0
        torch.testing.assert_close(
            together.hidden[row][words], alone.hidden[0][alone.mask[0] > 0], atol=1e-5, rtol=1e-4
        )


@every
def test_states_are_those_of_the_model_on_the_tokens_of_its_own_tokenizer(folders, kind):
    from transformers import AutoTokenizer, BertModel, CLIPTextModel, T5EncoderModel

    classes = {"pipeline": CLIPTextModel, "bert": BertModel, "t5": T5EncoderModel}
    if kind not in classes:
        pytest.skip("open_clip is compared with open_clip below")
    folder = folders[kind]
    model_folder = folder / "text_encoder" if kind == "pipeline" else folder
    model = classes[kind].from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(
        folder / "tokenizer" if kind == "pipeline" else folder
    )
    features = open_encoder(folder).encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, truncation=True, return_tensors="pt").input_ids
        with torch.inference_mode():
            wanted = model(input_ids=ids).last_hidden_state[0]
        words = int(features.mask[row].sum())
        before = FRAMES[kind][0]
        torch.testing.assert_close(
            features.hidden[row, before : before + words],
            wanted[before : before + words],
            atol=1e-5,
            rtol=1e-4,
        )


def test_the_pooled_state_of_open_clip_is_what_its_text_feature_is_made_of(folders):
    import open_clip

    name = f"local-dir:{folders['open_clip']}"
    model = open_clip.create_model(name).eval()
    encoder = open_encoder(folders["open_clip"])
    with torch.inference_mode():
        feature = model.encode_text(open_clip.get_tokenizer(name)(["two red apples"]))[0]
        projected = torch.tensor(encoder.state("two red apples")) @ model.text_projection
    torch.testing.assert_close(projected, feature, atol=1e-3, rtol=1e-3)


def test_pooled_features_are_the_mean_state_and_the_last(folders):
    features = open_encoder(folders["bert"]).encode(["a cat", ""])
    mean, last = features.pooled[0].chunk(2)
    torch.testing.assert_close(mean, features.hidden[0, 1:4].mean(0))
    torch.testing.assert_close(last, features.hidden[0, 3])
    torch.testing.assert_close(features.pooled[1], features.hidden[1, 1].repeat(2))


def test_open_clips_own_tokenizer_is_read_as_it_reads(tmp_path):
    from open_clip import SimpleTokenizer

    from cloud_server.training.encoders import _fast
    from edge_agent.routing.encoder import Tokenizer

    theirs = SimpleTokenizer()
    core = _fast(theirs).backend_tokenizer
    core.no_padding()
    core.no_truncation()
    core.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path / "tokenizer.json", 77, 0)
    for prompt in ("a cat", "Two RED apples, please!", "it's 3 o'clock", "café", ""):
        np.testing.assert_array_equal(ours.encode(prompt).input_ids[0], theirs([prompt])[0].numpy())


def test_roberta_has_fewer_places_than_positions():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=22, pad_token_id=1,
    )  # fmt: skip
    tower = HuggingFaceTower(RobertaModel(config).eval())
    assert tower.context_length == 20
    assert tower(torch.randint(2, 30, (1, 20)))[0].shape == (1, 20, 8)
    with pytest.raises(IndexError):
        tower(torch.randint(2, 30, (1, 21)))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_an_encoder_without_a_tokenizer_is_one_sentence(folders, tmp_path, kind):
    folder = tmp_path / "bare"
    shutil.copytree(folders[kind], folder, ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(
        ModelError, match=r"bare' has no tokenizer that can be read \(no tok.* put its"
    ):
        open_encoder(folder)


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(folders["bert"], folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"word{i}": 16 + i for i in range(20)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="knows 36 tokens and its text encoder only 16"):
        open_encoder(folder)


@pytest.mark.parametrize(("left", "told"), [(None, "are missing in"), (3, "do not fit its config")])
def test_weights_that_are_missing_or_of_another_shape_are_told(folders, tmp_path, left, told):
    broken = tmp_path / "broken"
    shutil.copytree(folders["bert"], broken)
    weights = load_file(broken / "model.safetensors")
    name = next(key for key in sorted(weights) if "attention.self.query.weight" in key)
    cut = weights.pop(name)[:left].contiguous()
    save_file(weights | ({name: cut} if left else {}), broken / "model.safetensors")
    with pytest.raises(ModelError, match=rf"weights .*{told}.*attention\.self\.query\.weight"):
        open_encoder(broken)


@pytest.mark.parametrize("what", ["empty folder", "broken weights", "no such id"])
def test_what_is_no_text_encoder_is_one_sentence(folders, tmp_path, monkeypatch, what):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = tmp_path
    if what == "broken weights":
        source = tmp_path / "broken"
        shutil.copytree(folders["bert"], source)
        (source / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError) as caught:
        open_encoder("nobody/no-such-model" if what == "no such id" else source)
    assert "cannot be opened" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
