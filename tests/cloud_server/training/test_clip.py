"""The starter CLIP: open_clip's folder, transformers' twin, and what the committed weights know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_server.starter import starter_folder
from cloud_server.training.loop import Budget
from cloud_server.training.starter import clip, clip_data, clip_model, scenes
from cloud_server.training.starter.tokenizer import CONTEXT_LENGTH, encode, train_tokenizer

PROMPTS = ["two red apples to the left of a cat and a house at night", "a dog", "a robot " * 30]

needs_font = pytest.mark.skipif(
    not any(path.exists() for path in scenes.FONT_PATHS),
    reason="drawing scenes needs the Debian package fonts-noto-color-emoji",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return starter_folder() / "clip"


@pytest.fixture(scope="module")
def model(folder) -> clip_model.open_clip.CLIP:
    return clip_model.load_clip(folder)


@pytest.fixture(scope="module")
def tokenizer(folder) -> clip.CLIPTokenizer:
    return clip.CLIPTokenizer.from_pretrained(folder)


@torch.inference_mode()
def test_transformers_has_the_hidden_states_of_the_first_layers(folder, model, tokenizer, tmp_path):
    clip_model.to_transformers(folder).save_pretrained(tmp_path)
    twin = clip_model.CLIPTextModel.from_pretrained(tmp_path).eval()
    tokens = encode(tokenizer, PROMPTS)
    states = model.token_embedding(tokens) + model.positional_embedding
    for block in model.transformer.resblocks[: clip_model.CONDITION_LAYERS]:
        states = block(states, attn_mask=model.attn_mask)
    theirs = twin(tokens).last_hidden_state
    assert torch.allclose(theirs, model.ln_final(states), atol=1e-5)
    assert torch.equal(clip_model.text_states(model, tokens)[0], model.ln_final(states))


@torch.inference_mode()
def test_leaving_padding_out_changes_nothing(model, tokenizer):
    tokens = encode(tokenizer, PROMPTS[:2])
    assert torch.allclose(
        clip_model.encode_text(model, tokens), model.encode_text(tokens), atol=1e-4
    )


def test_open_clip_opens_the_folder_with_its_tokenizer(folder, model):
    name = f"local-dir:{folder.resolve()}"
    theirs, preprocess = clip_model.open_clip.create_model_from_pretrained(name)
    tokens = clip_model.open_clip.get_tokenizer(name)(PROMPTS)
    assert tokens.shape == (len(PROMPTS), CONTEXT_LENGTH)
    assert torch.equal(theirs.text_projection, model.text_projection)
    assert preprocess is not None


@needs_font
def test_a_batch_depends_on_seed_and_step_alone(tokenizer):
    first, again, other = (clip_data.make_batch(tokenizer, 3, step, 8) for step in (5, 5, 6))
    for one, same in zip(first, again, strict=True):
        assert torch.equal(one, same)
    assert not torch.equal(first.tokens, other.tokens)
    assert len(first.pictures) == len(first.tokens) == 2 * len(first.spoiled) == 16


def test_sides_are_those_of_the_caption():
    groups = (scenes.Group("cat"), scenes.Group("dog", 2), scenes.Group("apple"))
    sides = clip_data._sides(scenes.Scene(groups, "above", None, (), ""))
    told = {scenes.NOUNS[i]: scenes.RELATIONS[side] for i, side in enumerate(sides) if side >= 0}
    assert told == {"cat": "above", "dog": "below", "apple": "below"}
    assert (clip_data._sides(scenes.Scene(groups, None, None, (), "")) == -1).all()


def test_half_of_the_scenes_stand_in_pairs_with_their_sides_exchanged():
    drawn = clip_data._scenes(np.random.default_rng(0), 12)
    for scene, turned in zip(drawn[6::2], drawn[7::2], strict=True):
        assert scene.groups == turned.groups
        assert turned.relation == scenes.OPPOSITE[scene.relation]
        assert scene.caption != turned.caption
        assert not scenes.held_out(scene)
        assert not scenes.held_out(turned)
        (x, y, *_), (other_x, other_y, *_) = scene.boxes[0], turned.boxes[0]
        assert x != other_x or y != other_y


@needs_font
def test_pairs_begin_with_two_things_of_six_nouns(tokenizer):
    pictures, tokens, sides = clip_data.make_pairs(tokenizer, 0, 1, 16, 6, 2)
    assert len(pictures) == len(tokens) == len(sides) == 32
    assert ((sides >= 0).sum(1) == 2).all()
    assert (sides >= 0).any(0).sum() <= 6
    counts = [clip.nouns_at(step) for step in (0, clip.FEW_UNTIL, 200, 10_000)]
    assert counts == [6, 6, 15, len(scenes.NOUNS)]


@needs_font
def test_the_committed_weights_know_the_world(model, tokenizer):
    report = clip.evaluate_clip(model, tokenizer, seed=11)
    assert report["retrieval"] > 0.9  # of 256 captions; chance is 0.004
    assert report["fooled"] < 0.15  # by a caption with one thing wrong; chance is 0.5
    assert report["turned"] < 0.25  # by one whose relation is turned round; chance is 0.5
    assert report["auroc"] > 0.95  # mean over the metrics at strength 0.5; chance is 0.5


def test_states_that_hold_their_tokens_are_recalled_best(tokenizer):
    tokens = encode(tokenizer, PROMPTS)
    recall = clip.Recall(len(tokenizer))
    codes = torch.nn.functional.normalize(recall.codes, dim=-1)
    told = sum(torch.nn.functional.pad(codes[k][tokens], (0, 0, k, 0))[:, : tokens.shape[1]]
               for k in range(clip.REMEMBERED))  # fmt: skip
    silent = torch.randn(told.shape, generator=torch.Generator().manual_seed(0))
    assert recall(told, tokens) < 0.5 * recall(silent, tokens)


@needs_font
@pytest.mark.slow
def test_training_writes_a_folder_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(clip.BATCH, "cpu", 4)
    out, work = tmp_path / "clip", tmp_path / "work"
    train_tokenizer(out, seed=0)
    for steps in (2, 3):
        clip.train_towers(out, work, Budget(steps=steps), seed=0, device="cpu")
    assert torch.load(work / "clip.pt", weights_only=True)["step"] == 3
    before = clip_model.load_clip(out)
    clip.train_recall(out, work, Budget(steps=2), seed=0, device="cpu")
    assert not torch.equal(
        before.positional_embedding, clip_model.load_clip(out).positional_embedding
    )
    before = clip_model.load_clip(out).state_dict()
    clip.train_sides(out, work, Budget(steps=2), seed=0, device="cpu")
    clip.train_top(out, work, Budget(steps=2), seed=0, device="cpu")
    after = clip_model.load_clip(out).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "text_projection" in changed
    assert {name.split(".")[0] for name in changed} == {"visual", "transformer", "text_projection"}
    locked = [f"transformer.resblocks.{i}." for i in range(clip_model.CONDITION_LAYERS)]
    assert not [name for name in changed if name.startswith(tuple(locked))]
