from __future__ import annotations

import numpy as np
import pytest

from edge_agent.errors import BundleError
from edge_agent.routing.encoder import TextEncoder, Tokenizer
from tests.tiny import BOS, CONTEXT, EOS, make_tokenizer, save_word_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder / "tokenizer.json", CONTEXT, 0)


@pytest.fixture(scope="module")
def reference(folder):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


class RecordingSession:
    def __init__(self):
        self.feeds = None

    def run(self, feeds):
        self.feeds = feeds
        return [np.zeros((1, CONTEXT, 6), np.float32), np.ones((1, 6), np.float32)]


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "Two RED apples on   grass", "café, 3 dogs", "🐈 猫"]
)
def test_ids_are_those_of_the_reference_tokenizer(tokenizer, reference, prompt):
    wanted = reference(prompt, padding="max_length", truncation=True).input_ids
    tokens = tokenizer.encode(prompt)
    assert tokens.input_ids.tolist() == [wanted]
    assert tokens.input_ids.dtype == np.int64


def test_the_mask_covers_the_prompt_and_neither_frame_nor_padding(tokenizer):
    mask = tokenizer.encode("a cat").mask
    assert mask.shape == (1, CONTEXT)
    assert mask[0].tolist() == [0, 1, 1] + [0] * (CONTEXT - 3)


def test_an_empty_prompt_has_an_empty_mask(tokenizer):
    assert tokenizer.encode("").mask.sum() == 0


def test_a_long_prompt_keeps_its_end_token_and_counts_what_was_dropped(tokenizer, reference):
    tokens = tokenizer.encode("a cat " * 40)
    assert tokens.input_ids.shape == (1, CONTEXT)
    assert tokens.input_ids[0, -1] == reference.eos_token_id
    assert tokens.mask[0].tolist() == [0, *[1] * (CONTEXT - 2), 0]
    assert tokens.dropped == 80 - (CONTEXT - 2)


@pytest.mark.parametrize("control", [BOS, EOS, EOS.upper()])
@pytest.mark.parametrize("form", ["{}", "a {} cat", "cat{}cat", "{0}{0}"])
def test_control_tokens_in_a_prompt_are_plain_text(tokenizer, reference, control, form):
    row = tokenizer.encode(form.format(control)).input_ids[0].tolist()
    assert row.count(reference.bos_token_id) == 1
    assert row.count(reference.eos_token_id) == 1
    plain = reference.decode(row, skip_special_tokens=True).replace(" ", "").lower()
    assert "endoftext" in plain or "startoftext" in plain


def test_an_exclamation_mark_is_a_word_and_not_padding(tokenizer):
    tokens = tokenizer.encode("cat !")
    assert tokens.mask.sum() == 2
    assert tokens.input_ids[0, 2] != 0


def test_encoding_hands_token_ids_to_the_network_and_its_states_back(tokenizer):
    session = RecordingSession()
    encoded = TextEncoder(session, tokenizer).encode("a cat")
    assert session.feeds.keys() == {"input_ids"}
    assert session.feeds["input_ids"] is encoded.input_ids
    assert encoded.hidden.shape == (1, CONTEXT, 6)
    assert encoded.pooled.shape == (1, 6)
    assert encoded.mask.sum() == 2


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_a_broken_tokenizer_file_is_named_with_what_to_do(tmp_path, text):
    file = tmp_path / "tokenizer.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json.*python -m export"):
        Tokenizer(file, CONTEXT, 0)


@pytest.mark.parametrize(
    ("frame", "ids", "mask"),
    [
        ("[CLS] $A [SEP]", [1, 4, 5, 2], [0, 1, 1, 0]),
        ("$A [SEP]", [4, 5, 2], [1, 1, 0]),
        ("[CLS] $A", [1, 4, 5], [0, 1, 1]),
        ("$A", [4, 5], [1, 1]),
    ],
)
def test_a_prompt_stands_in_the_frame_of_its_tokenizer(tmp_path, frame, ids, mask):
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    save_word_tokenizer(tmp_path, special, frame, pad_token="[PAD]")
    file = tmp_path / "tokenizer.json"
    bare = Tokenizer(file, 6, None).encode("a cat")
    assert bare.input_ids.tolist() == [ids]
    assert bare.mask.tolist() == [mask]
    padded = Tokenizer(file, 6, 0).encode("a cat")
    assert padded.input_ids.tolist() == [ids + [0] * (6 - len(ids))]
    assert padded.mask.tolist() == [mask + [0] * (6 - len(ids))]
    long = Tokenizer(file, 6, None).encode("cat " * 9)
    assert long.input_ids.shape == (1, 6)
    assert long.dropped == 9 - long.mask.sum() == 9 - (6 - len(ids) + 2)
    assert Tokenizer(file, 6, None).encode("").mask.sum() == 0
    assert Tokenizer(file, 6, None).encode("").input_ids.size > 0


def test_a_word_that_the_vocabulary_lacks_is_a_word_of_the_prompt(tmp_path):
    save_word_tokenizer(tmp_path, ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[CLS] $A [SEP]")
    tokens = Tokenizer(tmp_path / "tokenizer.json", 8, None).encode("a zebra [SEP]")
    assert tokens.input_ids[0].tolist().count(2) == 1
    assert tokens.mask.sum() >= 2


def test_a_tokenizer_that_finds_no_words_is_refused(tmp_path):
    from tokenizers import Tokenizer as Core
    from tokenizers.models import WordLevel

    file = tmp_path / "tokenizer.json"
    Core(WordLevel({"cat": 0}, unk_token="?")).save(str(file))
    with pytest.raises(BundleError, match="tokenizer"):
        Tokenizer(file, CONTEXT, 0)
