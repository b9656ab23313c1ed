"""The starter tokenizer: CLIP's byte-level BPE, trained on captions of the starter world.

The folder it writes opens in transformers (slow and fast), in open_clip's HFTokenizer and, on the
device, in `tokenizers` alone, with the same ids for ordinary prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from cloud_server.torchvision_guard import guard
from cloud_server.training.quality import load_metrics
from cloud_server.training.starter.scenes import NOUNS, sample_scene

guard()
from transformers import CLIPTokenizer, CLIPTokenizerFast  # noqa: E402  the guard must come first
from transformers.models.clip.tokenization_clip import bytes_to_unicode  # noqa: E402

CONTEXT_LENGTH = 32
VOCABULARY = 1536
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
_WORD = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train_tokenizer(out: Path, seed: int) -> CLIPTokenizer:
    """Learn merges from captions and metric texts and write the tokenizer's files to `out`.

    END gets the highest id, which open_clip's pooling by argmax needs; PAD has id 0.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = list(bytes_to_unicode().values())  # the first is PAD
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    learner.train_from_iterator(_corpus(seed), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    tokens = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])
    tokens |= dict.fromkeys(left + right for left, right in merges)
    vocabulary = {token: i for i, token in enumerate([*tokens, START, END])}
    out.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = out / "vocab.json", out / "merges.txt"
    vocab_file.write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = {"vocab_file": str(vocab_file), "merges_file": str(merges_file)}
    settings = {"pad_token": PAD, "model_max_length": CONTEXT_LENGTH}
    CLIPTokenizerFast(**files, **settings).save_pretrained(out)  # writes tokenizer.json
    tokenizer = CLIPTokenizer(**files, **settings)
    tokenizer.save_pretrained(out)
    return tokenizer


def encode(tokenizer: CLIPTokenizer | CLIPTokenizerFast, prompts: list[str]) -> Tensor:
    """Return token ids (B, context length), cut with a final END and padded with PAD's id 0."""
    encoded = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length
    )
    return torch.tensor(encoded["input_ids"])


def _corpus(seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for _ in range(20_000):
        yield sample_scene(rng).caption
    for metric in load_metrics():
        yield from (metric.positive, metric.negative) * 50
    yield from NOUNS * 50
