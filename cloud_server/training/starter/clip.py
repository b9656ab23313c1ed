"""The starter CLIP: an open_clip model trained on captions and on the ten quality pairs.

Its frozen text tower conditions both diffusion models and feeds the router; its picture tower
measures quality. Both are learnt together first, until the text tower is locked, as the diffusion
models will need it; then the picture tower learns on.
Captions with one thing wrong (colours, sides, counts, nouns, places) stand in every batch, because
a contrastive encoder otherwise forgets word order.
What conditions diffusion are the states of all tokens, and of these the contrast trains the last
alone: nouns then lie in few directions and next to "red" hardly differ. So every state then learns
to recall its own token and those before it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cloud_server.torchvision_guard import guard
from cloud_server.training.loop import Budget, Prefetch, fit
from cloud_server.training.quality import load_metrics
from cloud_server.training.starter.autoencoder import to_tensor
from cloud_server.training.starter.degradations import degrade
from cloud_server.training.starter.scenes import batch_at, caption_negatives, sample_scene
from cloud_server.training.starter.tokenizer import CONTEXT_LENGTH, encode

guard()
import open_clip  # noqa: E402  the guard must come first
from safetensors.torch import save_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

Config = dict[str, Any]  # open_clip's own description of a model

BATCH = {"cpu": 48, "cuda": 192}  # scenes, each as it is and spoiled
CAPTIONS = {"cpu": 128, "cuda": 512}  # a batch of what needs no pictures
STAGES = {"clip": (0, 8e-4), "clip-picture": (1_000_000, 2e-4)}  # where data begin; rate
LOCKED_FROM = 0.6  # of the budget
RECALL_SHARE = 0.3  # of what is left then
WIDTH, HEADS, TEXT_LAYERS = 192, 6, 4
REMEMBERED = 4  # tokens that each state recalls: its own and those before it
RECALL_SCALE = 16.0  # of the cosine of a state and a token's code
VISION: Config = {
    "image_size": 128,
    "patch_size": 16,
    "width": WIDTH,
    "layers": 6,
    "head_width": 32,
}
METRICS = load_metrics()
POLES = [text for metric in METRICS for text in (metric.positive, metric.negative)]


def model_config(vocabulary: int) -> Config:
    """Return the open_clip description of the model, 5 M parameters."""
    return {
        "embed_dim": WIDTH,
        "vision_cfg": VISION,
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary,
            "width": WIDTH,
            "heads": HEADS,
            "layers": TEXT_LAYERS,
            "hf_tokenizer_name": "starter",  # any name: the folder's own files are used
            "tokenizer_kwargs": {"clean": "whitespace"},
        },
    }


def train_clip(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Train both towers; write an open_clip folder to `out`, which holds the tokenizer already."""
    both, later = budget.split(LOCKED_FROM)
    recall, picture = later.split(RECALL_SHARE)
    train_towers(out, work, both, seed, device)
    train_recall(out, work, recall, seed, device)
    train_picture_tower(out, work, picture, seed, device)


def train_towers(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Train a text tower and a small vision transformer together, from nothing."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(out)
    config = model_config(len(tokenizer))
    model = open_clip.CLIP(**_model_arguments(config))
    _fit("clip", model, config, tokenizer, out, work, budget, seed, device)


class Recall(nn.Module):
    """Reads the last tokens from each token's state; needed in training only.

    State and codes are compared by angle, so that tokens must lie far apart in the states
    themselves, and not only where a free linear reader could still part them.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(REMEMBERED, vocabulary, WIDTH))

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the cross-entropy of recalling `tokens` (B, n) from `states` (B, n, d).

        Every kind of token counts alike, or articles would drown the nouns.
        """
        states, codes = F.normalize(states, dim=-1), F.normalize(self.codes, dim=-1)
        ends = tokens.argmax(-1, keepdim=True)
        real = torch.arange(tokens.shape[1], device=tokens.device) <= ends
        losses = []
        for back in range(REMEMBERED):
            known = real[:, back:]
            logits = RECALL_SCALE * states[:, back:][known] @ codes[back].T
            truth = tokens[:, : tokens.shape[1] - back][known]
            surprise = F.cross_entropy(logits, truth, reduction="none")
            kinds, kind, counts = truth.unique(return_inverse=True, return_counts=True)
            losses.append((surprise / counts[kind]).sum() / len(kinds))
        return torch.stack(losses).mean()


def train_recall(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Make every token's state in the folder `out` recall, and keep what captions come to."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(out)
    config = json.loads((out / "open_clip_config.json").read_text())["model_cfg"]
    model, before = load_clip(out).to(device), load_clip(out).to(device)
    model.visual.requires_grad_(False)
    trained = nn.ModuleDict({"clip": model, "recall": Recall(len(tokenizer))})
    kind = torch.device(device).type

    def make(step: int) -> Tensor:
        rng = np.random.default_rng([seed, step, 2])
        return encode(tokenizer, POLES + [sample_scene(rng).caption for _ in range(CAPTIONS[kind])])

    data = Prefetch(make, device)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        tokens = data(step).to(device)
        with torch.no_grad():
            wanted = _encode_text(before, tokens)
        with sdpa_kernel(SDPBackend.MATH):
            states = _text_states(model, tokens)
        moved = 1 - F.cosine_similarity(_pool(model, states, tokens), wanted).mean()
        forgotten = trained["recall"](states, tokens[:, : states.shape[1]])
        shown = {"forgotten": forgotten.item(), "moved": moved.item()}
        return forgotten + 10 * moved, shown

    fit(
        "clip-recall", trained, loss_fn, lr=8e-4, budget=budget, work=work, device=device,
        ema=0.99, warmup=50, on_checkpoint=lambda _: save_clip(model, config, out),
    )  # fmt: skip


def train_picture_tower(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Let the picture tower in the folder `out` learn on; the text tower stays to the last bit."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(out)
    config = json.loads((out / "open_clip_config.json").read_text())["model_cfg"]
    model = load_clip(out)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual."))
    _fit("clip-picture", model, config, tokenizer, out, work, budget, seed, device)


def _fit(
    name: str,
    model: open_clip.CLIP,
    config: Config,
    tokenizer: CLIPTokenizer,
    out: Path,
    work: Path,
    budget: Budget,
    seed: int,
    device: str,
) -> None:
    """Draw captions to their pictures, and pictures to the poles that they deserve."""
    pairs = encode(tokenizer, POLES).to(device)
    kind = torch.device(device).type
    first, rate = STAGES[name]
    learns_text = model.text_projection.requires_grad

    def make(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pictures, captions, goodness, spoiled = _batch(seed, first + step, BATCH[kind])
        return pictures, encode(tokenizer, captions), goodness, spoiled

    data = Prefetch(make, device)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures, tokens, goodness, spoiled = data(step)
        tokens = tokens.to(device)  # (2B, n): captions, then wrong ones
        goodness, spoiled = goodness.to(device), spoiled.to(device)
        # On a CPU the fused attention's backward pass takes three quarters of a step.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(kind, dtype=torch.bfloat16):
            image = F.normalize(model.encode_image(to_tensor(pictures, device)).float(), dim=-1)
            with torch.set_grad_enabled(learns_text):
                text = F.normalize(_encode_text(model, tokens), dim=-1)
                poles = F.normalize(_encode_text(model, pairs), dim=-1)
        scale = model.logit_scale.exp().clamp(max=100)
        logits = scale * image @ text.T  # (2B, 2B)
        truth = torch.arange(len(spoiled), device=device)
        by_text = F.cross_entropy(logits[: len(truth), : len(truth)].T, truth)
        contrast = (F.cross_entropy(logits, truth.repeat(2)) + by_text) / 2
        gap = scale * image @ (poles[0::2] - poles[1::2]).T  # (2B, k)
        worse = gap[len(truth) :][truth, spoiled]
        better = gap[: len(truth)][truth, spoiled]
        losses = F.binary_cross_entropy_with_logits(gap, goodness, reduction="none")
        own = losses[len(truth) :][truth, spoiled].mean() + F.softplus(worse - better).mean()
        # What a spoiled picture should score on the other metrics is known less well.
        quality = own + losses[: len(truth)].mean() + 0.1 * losses[len(truth) :].mean()
        right = (logits[: len(truth)].argmax(1) == truth).float().mean().item()
        ranked = (better > worse).float().mean().item()
        return contrast + quality, {"contrast": contrast.item(), "right": right, "ranked": ranked}

    def save(ready: open_clip.CLIP) -> None:
        save_clip(ready, config, out)
        report = evaluate_clip(ready, tokenizer, seed + 1, device)
        print(f"\n{name}:", json.dumps(report), flush=True)

    fit(
        name, model, loss_fn, lr=rate, budget=budget, work=work, device=device,
        ema=0.997, warmup=100, weight_decay=0.05, on_checkpoint=save,
    )  # fmt: skip


def _model_arguments(config: Config) -> Config:
    text = {k: v for k, v in config["text_cfg"].items() if k != "tokenizer_kwargs"}
    return {**config, "text_cfg": text}


def _text_states(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Encode as open_clip does, without the padding that no prompt of the batch needs."""
    length = int(tokens.argmax(-1).max()) + 1
    states = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    states = model.transformer(states, attn_mask=model.attn_mask[:length, :length])
    return model.ln_final(states)


def _pool(model: open_clip.CLIP, states: Tensor, tokens: Tensor) -> Tensor:
    ends = tokens.argmax(-1)
    pooled = states[torch.arange(len(tokens), device=tokens.device), ends]
    return (pooled @ model.text_projection).float()


def _encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    return _pool(model, _text_states(model, tokens), tokens)


def _batch(seed: int, step: int, scenes: int) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Return 2B pictures (2B, H, W, 3), 2B captions, goodness in 0..1 (2B, k), metrics (B,).

    The first B pictures are as they should be, the others the same ones spoiled in one metric each;
    after their B captions come B that are wrong. At strength s goodness is 1 - s or so.
    """
    pictures, captions, drawn = batch_at(seed, step, scenes)
    rng = np.random.default_rng([seed, step, 1])
    wrong = [str(rng.choice(caption_negatives(scene, rng))) for scene in drawn]
    goodness = np.full((2 * scenes, len(METRICS)), 0.97, np.float32)
    metrics = rng.integers(len(METRICS), size=scenes)
    spoiled = []
    for i, (metric, strength) in enumerate(zip(metrics, rng.random(scenes).tolist(), strict=True)):
        picture = degrade(pictures[i].astype(np.float32) / 255, METRICS[metric].name, strength, rng)
        spoiled.append((picture * 255).round().astype(np.uint8))
        goodness[scenes + i, metric] = 0.03 + 0.94 * (1 - strength) ** 1.5
    both = torch.from_numpy(np.concatenate([pictures, np.stack(spoiled)]))
    return both, captions + wrong, torch.from_numpy(goodness), torch.from_numpy(metrics)


def save_clip(model: open_clip.CLIP, config: Config, out: Path) -> None:
    """Write open_clip's config and half-precision weights beside the tokenizer in `out`."""
    described = {
        "model_cfg": config,
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    (out / "open_clip_config.json").write_text(json.dumps(described, indent=1) + "\n")
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
    partial = out / "open_clip_model.partial"
    save_file(weights, partial)
    partial.replace(out / "open_clip_model.safetensors")


def load_clip(folder: Path) -> open_clip.CLIP:
    """Open the folder in full precision, ready to use."""
    return open_clip.create_model(f"local-dir:{folder.resolve()}", precision="fp32").eval()


def to_transformers(folder: Path) -> CLIPTextModel:
    """Return the text tower as transformers' class: the same weights, the same hidden states."""
    source = load_clip(folder).state_dict()
    vocabulary = source["token_embedding.weight"].shape[0]
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
    )
    model = CLIPTextModel(config)
    target = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    names = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for i in range(TEXT_LAYERS):
        ours, theirs = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            for name, other in names.items():
                target[f"{theirs}.{other}.{kind}"] = source[f"{ours}.{name}.{kind}"]
            joined = source[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            for letter, part in zip("qkv", joined, strict=True):
                target[f"{theirs}.self_attn.{letter}_proj.{kind}"] = part
    model.text_model.load_state_dict(target, strict=False)
    return model.eval()


@torch.inference_mode()
def evaluate_clip(
    model: open_clip.CLIP, tokenizer: CLIPTokenizer, seed: int, device: str = "cpu"
) -> dict[str, float]:
    """Measure on 256 fresh scenes: retrieval R@1, share of wrong captions preferred, mean AUROC.

    The AUROC is of each metric on its own degradation at strength 0.5 against untouched pictures.
    """
    pictures, captions, scenes = batch_at(seed, 0, 256)
    rng = np.random.default_rng([seed, 1])
    wrong = [str(rng.choice(caption_negatives(scene, rng))) for scene in scenes]

    def image(batch: np.ndarray) -> Tensor:
        return F.normalize(model.encode_image(to_tensor(batch, device)), dim=-1)

    text = F.normalize(_encode_text(model, encode(tokenizer, captions + wrong).to(device)), dim=-1)
    similar = image(pictures) @ text.T  # (256, 512)
    right = similar.diagonal()
    report = {
        "retrieval": (similar[:, :256].argmax(1).cpu() == torch.arange(256)).float().mean().item(),
        "fooled": (similar[:, 256:].diagonal() > right).float().mean().item(),
    }
    aurocs = []
    poles = F.normalize(_encode_text(model, encode(tokenizer, POLES).to(device)), dim=-1)
    contrast = poles[0::2] - poles[1::2]
    clean = image(pictures[:64]) @ contrast.T
    for i, metric in enumerate(METRICS):
        spoiled = [
            degrade(p.astype(np.float32) / 255, metric.name, 0.5, rng) for p in pictures[:64]
        ]
        scores = image((np.stack(spoiled) * 255).round().astype(np.uint8)) @ contrast[i]
        auroc = (clean[:, i, None] > scores[None]).float().mean().item()
        report[f"auroc_{metric.name}"] = auroc
        aurocs.append(auroc)
    report["auroc"] = float(np.mean(aurocs))
    return {name: round(value, 4) for name, value in report.items()}
