"""The starter tokenizer: one folder, the same ids in every library that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cloud_server.torchvision_guard import guard
from cloud_server.training.starter.tokenizer import CONTEXT_LENGTH, encode, train_tokenizer

guard()
import open_clip.tokenizer  # noqa: E402
from transformers import CLIPTokenizer, CLIPTokenizerFast  # noqa: E402

PROMPTS = [
    "a cat",
    "Two RED apples   to the left of a cat and a house at night",
    "an astronaut's café, 3 zebras!",
    "",
    "word " * 60,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, seed=0)
    return folder


def test_all_libraries_give_the_same_ids(folder):
    ours = encode(CLIPTokenizer.from_pretrained(folder), PROMPTS)
    assert ours.shape == (len(PROMPTS), CONTEXT_LENGTH)
    fast = encode(CLIPTokenizerFast.from_pretrained(folder), PROMPTS)
    by_open_clip = open_clip.tokenizer.HFTokenizer(
        str(folder), context_length=CONTEXT_LENGTH, clean="whitespace"
    )(PROMPTS)
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    alone.enable_truncation(CONTEXT_LENGTH)
    alone.enable_padding(length=CONTEXT_LENGTH, pad_id=0, pad_token="!")
    rust = [alone.encode(prompt).ids for prompt in PROMPTS]
    assert ours.tolist() == fast.tolist() == by_open_clip.tolist() == rust


def test_the_end_token_has_the_highest_id_and_closes_every_prompt(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.pad_token_id == 0
    for row in encode(tokenizer, PROMPTS):
        assert tokenizer.eos_token_id in row.tolist()


def test_words_of_the_world_are_single_tokens(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert [tokenizer.tokenize(word) for word in ("elephant", "two", "purple")] == [
        ["elephant</w>"], ["two</w>"], ["purple</w>"]
    ]  # fmt: skip


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    train_tokenizer(tmp_path, seed=0)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
