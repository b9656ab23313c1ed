"""The frozen text encoder that a router reads prompts with: a folder or id, in any usual format.

Hugging Face's (CLIP, BERT, MiniLM, DistilBERT, RoBERTa, the encoder of T5, ...), open_clip's, or a
diffusers pipeline, whose text encoder it then is. Prompts are split by the class that the device
splits them by, so ids and masks are the device's.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from cloud_server.errors import ModelError
from cloud_server.torchvision_guard import guard
from cloud_server.training.predictor import pooled
from cloud_server.training.towers import ClipTower, HuggingFaceTower, OpenClipTower, Tower
from cloud_server.training.weights import load_whole
from edge_agent.routing.encoder import Tokenizer

guard()
import open_clip  # noqa: E402  the guard must come first
import transformers  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, CLIPTokenizerFast  # noqa: E402

BATCH = 64
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_FILES = (OPEN_CLIP_CONFIG, "open_clip_model.safetensors")
CLIP_TYPES = ("clip", "clip_text_model")
NOT_READ = ("position_ids", "pooler.")  # weights that no state depends on


@dataclass(frozen=True, slots=True)
class Features:
    """Frozen hidden states (N, n, d) and masks (N, n), 1 on each prompt's tokens and their end."""

    hidden: Tensor
    mask: Tensor

    @property
    def pooled(self) -> Tensor:
        """The mean state of the tokens of each prompt beside that of the last, (N, 2d)."""
        return pooled(self.hidden, self.mask)[:, :-1]

    def at(self, rows: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """Return hidden states and masks of some prompts."""
        return self.hidden[rows], self.mask[rows]

    def some(self, rows: NDArray[Any]) -> Features:
        """Return the features of some prompts."""
        return Features(*self.at(rows))


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A text encoder with its tokenizer; `json` and `files` are what an export needs of them.

    `json` is the tokenizer as the package tokenizers reads it, `context_length` the most tokens
    of a prompt with its frame.
    """

    name: str
    tower: Tower
    json: str
    context_length: int
    files: tuple[Path, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, as it is on the device."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer.json"
            file.write_text(self.json, encoding="utf-8")
            return Tokenizer(file, self.context_length, self.tower.pad_id)

    @torch.no_grad()  # inference mode would leave tensors that nothing can be trained on
    def encode(self, prompts: Sequence[str], device: str = "cpu") -> Features:
        """Run the encoder on prompts. Those of one length go together, so that none is padded."""
        tokenizer, tower = self.tokenizer, self.tower.to(device).eval()
        tokens = [tokenizer.encode(prompt) for prompt in prompts]
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, each in enumerate(tokens):
            by_length[each.input_ids.shape[1]].append(row)
        # Behind the end of all prompts there is nothing that a predictor reads.
        longest = max((int(t.mask.nonzero()[1].max(initial=0)) + 1 for t in tokens), default=1)
        hidden = torch.zeros(len(tokens), longest, tower.width)
        mask = torch.zeros(len(tokens), longest)
        with tqdm(total=len(tokens), desc="prompts", mininterval=2.0) as bar:
            for length, rows in sorted(by_length.items()):
                n = min(length, longest)
                for some in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
                    ids = torch.cat([torch.from_numpy(tokens[row].input_ids) for row in some])
                    hidden[some, :n] = tower(ids.to(device))[0][:, :n].float().cpu()
                    masks = torch.cat([torch.from_numpy(tokens[row].mask) for row in some])
                    mask[some, :n] = masks[:, :n]
                    bar.update(len(some))
        return Features(hidden, mask)

    @torch.inference_mode()
    def state(self, prompt: str) -> list[float]:
        """Return the pooled state (d,) of a prompt, by which an export knows this encoder."""
        ids = torch.from_numpy(self.tokenizer.encode(prompt).input_ids)
        tower = self.tower.cpu().eval()
        return [round(value, 4) for value in tower(ids)[1][0].tolist()]


def open_encoder(source: str | Path) -> TextEncoder:
    """Open a text encoder: a folder, a Hugging Face id, or MODEL/PRETRAINED of open_clip.

    Raises ModelError where there is none, or one without a tokenizer.
    """
    folder, name = Path(source), Path(source).name if Path(source).is_dir() else str(source)
    model, _, pretrained = str(source).partition("/")
    try:
        if (folder / "model_index.json").is_file():
            return _transformers(name, folder / "text_encoder", folder / "tokenizer")
        if (folder / OPEN_CLIP_CONFIG).is_file():
            files = tuple(folder / file for file in OPEN_CLIP_FILES)
            return _open_clip(name, f"local-dir:{folder.resolve()}", None, files)
        if not folder.is_dir() and model in open_clip.list_models():
            return _open_clip(name, model, pretrained or None, ())
        return _transformers(name, folder if folder.is_dir() else str(source))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        line = shorten(str(error), 160)
        raise ModelError(
            f"the text encoder '{source}' cannot be opened ({line}); pass a folder or id in "
            "Hugging Face or open_clip format"
        ) from error


def _transformers(
    name: str, source: str | Path, vocabulary: str | Path | None = None
) -> TextEncoder:
    config = AutoConfig.from_pretrained(source)
    tokenizer = read_tokenizer(vocabulary or source)
    settings: dict[str, Any] = {"dtype": torch.float32, "spared": NOT_READ}
    tower: Tower
    if config.model_type in CLIP_TYPES:
        model = load_whole(CLIPTextModel, source, **settings)
        tower = ClipTower(model, int(tokenizer.pad_token_id) if vocabulary else None)
    else:
        known = type(config) in transformers.AutoModelForTextEncoding._model_mapping
        kind = transformers.AutoModelForTextEncoding if known else transformers.AutoModel
        model = load_whole(kind, source, **settings)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        tower = HuggingFaceTower(getattr(model, "text_model", model))
    files = (source,) if isinstance(source, Path) else ()
    return assemble(name, tower, tokenizer, files)


def _open_clip(
    name: str, model_name: str, pretrained: str | None, files: tuple[Path, ...]
) -> TextEncoder:
    model = open_clip.create_model(model_name, pretrained, precision="fp32")
    text = getattr(model, "text", model)  # some open_clip classes nest it, some do not
    if model_name.startswith("local-dir:"):
        tokenizer = read_tokenizer(Path(model_name.removeprefix("local-dir:")))
    else:
        tokenizer = _fast(open_clip.get_tokenizer(model_name))
    if hasattr(text, "token_embedding"):
        own = getattr(text, "pad_id", 0)
        pad = tokenizer.pad_token_id
        return assemble(
            name, OpenClipTower(text, own if pad is None else int(pad)), tokenizer, files
        )
    return assemble(name, HuggingFaceTower(text.transformer), tokenizer, files)


def read_tokenizer(source: str | Path) -> Any:
    """Read a tokenizer in a form that the device can run; raises ModelError."""
    try:
        if (
            isinstance(source, Path)
            and not any(source.glob("*token*"))
            and not any(source.glob("*vocab*"))
        ):
            raise OSError("no tokenizer files")
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except Exception as error:  # a damaged tokenizer.json is a bare Exception
        line = shorten(str(error).strip().partition("\n")[0], 160)
        raise ModelError(
            f"the text encoder '{source}' has no tokenizer that can be read ({line}); put its "
            "tokenizer.json, or its vocabulary files, beside its config.json"
        ) from error
    return _fast(tokenizer)


def _fast(tokenizer: Any) -> Any:
    """Return the tokenizer in its fast form, converting the one that open_clip brings along."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        with TemporaryDirectory() as folder:
            vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
            vocabulary.write_text(json.dumps(tokenizer.encoder), encoding="utf-8")
            lines = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
            merges.write_text("\n".join(lines) + "\n", encoding="utf-8")
            start, end = (tokenizer.decoder[i] for i in tokenizer.all_special_ids[:2])
            return CLIPTokenizerFast(
                str(vocabulary), str(merges), bos_token=start, eos_token=end, unk_token=end,
                pad_token="!", model_max_length=tokenizer.context_length,
            )  # fmt: skip
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} has no fast form, which the device needs; "
            "save the model's tokenizer as tokenizer.json"
        )
    return tokenizer


def assemble(name: str, tower: Tower, tokenizer: Any, files: tuple[Path, ...]) -> TextEncoder:
    """Put a tower and its tokenizer together; raises ModelError where they do not match."""
    if len(tokenizer) > tower.vocab_size:
        raise ModelError(
            f"the tokenizer of '{name}' knows {len(tokenizer)} tokens and its text encoder only "
            f"{tower.vocab_size}; put the tokenizer that belongs to it in its place"
        )
    core = tokenizer.backend_tokenizer
    core.no_padding()
    core.no_truncation()
    longest = min(int(tokenizer.model_max_length), tower.context_length)
    return TextEncoder(name, tower.eval(), core.to_str(), longest, files)
