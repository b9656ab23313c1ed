"""The starter CLIP: an open_clip model trained on captions and on the ten quality pairs.

The first layers of its text tower, frozen, condition both diffusion models and feed the router, as
Stable Diffusion 2 leaves out the last one; the whole measures quality. Both towers are learnt
together first, until those layers are locked, as the diffusion models will need them; then the
picture tower and the text tower's other layers learn on.
Captions with one thing wrong (sides, colours, counts, nouns, places) stand in every batch, because
a contrastive encoder otherwise forgets word order. Which thing is on which side it hears last: as
long as neither tower knows, the other has nothing to learn it from, so both must tell it, too.
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
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cloud_server.torchvision_guard import guard
from cloud_server.training.loop import Budget, Prefetch, fit
from cloud_server.training.quality import load_metrics
from cloud_server.training.starter.autoencoder import to_tensor
from cloud_server.training.starter.degradations import degrade
from cloud_server.training.starter.scenes import (
    NOUNS,
    OPPOSITE,
    RELATIONS,
    Scene,
    batch_at,
    caption_negatives,
    draw,
    held_out,
    sample_scene,
    turned_round,
)
from cloud_server.training.starter.tokenizer import CONTEXT_LENGTH, encode

guard()
import open_clip  # noqa: E402  the guard must come first
from safetensors.torch import save_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

Config = dict[str, Any]  # open_clip's own description of a model

BATCH = {"cpu": 48, "cuda": 192}  # scenes, each as it is and spoiled
CAPTIONS = {"cpu": 128, "cuda": 512}  # a batch of what needs no pictures
STAGES = {"clip": (0, 8e-4), "clip-top": (1_000_000, 5e-4)}  # where data begin; rate
LOCKED_FROM = 0.6  # of the budget
RECALL_SHARE = 0.3  # of what is left then
WIDTH, HEADS, TEXT_LAYERS = 192, 6, 6
CONDITION_LAYERS = 4  # of them, whose states condition diffusion and feed the router
SIDES_SCALE = 16.0  # of the cosine of an embedding and a side's code
HARD_TO_SEE = {"Integrity": 3.0}  # how much more often than others a metric is spoiled
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
    """Return the open_clip description of the model, 6 M parameters."""
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
    recall, top = later.split(RECALL_SHARE)
    train_towers(out, work, both, seed, device)
    train_recall(out, work, recall, seed, device)
    train_top(out, work, top, seed, device)


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
            states, last = _text_states(model, tokens)
        moved = 1 - F.cosine_similarity(_pool(model, last, tokens), wanted).mean()
        forgotten = trained["recall"](states, tokens[:, : states.shape[1]])
        shown = {"forgotten": forgotten.item(), "moved": moved.item()}
        return forgotten + 10 * moved, shown

    fit(
        "clip-recall", trained, loss_fn, lr=8e-4, budget=budget, work=work, device=device,
        ema=0.99, warmup=50, on_checkpoint=lambda _: save_clip(model, config, out),
    )  # fmt: skip


def train_top(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Let all in the folder `out` learn on but what other models read, which stays to the last bit.

    That is the embeddings, the first layers and the last normalisation of the text tower.
    """
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(out)
    config = json.loads((out / "open_clip_config.json").read_text())["model_cfg"]
    model = load_clip(out)
    model.requires_grad_(False)
    learning = (model.visual, model.transformer.resblocks[CONDITION_LAYERS:])
    for part in learning:
        part.requires_grad_(True)
    model.text_projection.requires_grad_(True)
    _fit("clip-top", model, config, tokenizer, out, work, budget, seed, device)


class Sides(nn.Module):
    """Reads from an embedding on which side a noun's things stand; needed in training only.

    One reader for both towers, so that they say it in the same way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(len(NOUNS), len(RELATIONS), WIDTH))

    def forward(self, embeddings: Tensor, sides: Tensor) -> Tensor:
        """Return the cross-entropy of telling `sides` (B, nouns), -1 if unknown, from (B, d)."""
        row, noun = torch.nonzero(sides >= 0, as_tuple=True)
        codes = F.normalize(self.codes[noun], dim=-1)  # (R, 4, d)
        logits = SIDES_SCALE * torch.einsum("rsd,rd->rs", codes, embeddings[row])
        return F.cross_entropy(logits, sides[row, noun])


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

    trained = nn.ModuleDict({"clip": model, "sides": Sides()})

    def make(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        pictures, captions, *truths = _batch(seed, first + step, BATCH[kind])
        return pictures, encode(tokenizer, captions), *truths

    data = Prefetch(make, device)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures, *others = data(step)
        # Tokens (2B, n) are of captions, then of wrong ones.
        tokens, goodness, spoiled, sides = (value.to(device) for value in others)
        # On a CPU the fused attention's backward pass takes three quarters of a step.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(kind, dtype=torch.bfloat16):
            image = F.normalize(model.encode_image(to_tensor(pictures, device)).float(), dim=-1)
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
        seen, told = (trained["sides"](x[: len(truth)], sides) for x in (image, text))
        shown = {
            "contrast": contrast,
            "right": (logits[: len(truth)].argmax(1) == truth).float().mean(),
            "ranked": (better > worse).float().mean(),
            "seen": seen,
            "told": told,
        }
        loss = contrast + quality + seen + told
        return loss, {name: value.item() for name, value in shown.items()}

    def save(ready: nn.ModuleDict) -> None:
        save_clip(ready["clip"], config, out)
        report = evaluate_clip(ready["clip"], tokenizer, seed + 1, device)
        print(f"\n{name}:", json.dumps(report), flush=True)

    layers = (model.visual.transformer.resblocks, model.transformer.resblocks)
    matrices = [w for part in layers for w in part.parameters() if w.ndim == 2 and w.requires_grad]
    fit(
        name, trained, loss_fn, lr=rate, budget=budget, work=work, device=device,
        ema=0.997, warmup=100, weight_decay=0.05, hidden=matrices, on_checkpoint=save,
    )  # fmt: skip


def _model_arguments(config: Config) -> Config:
    text = {k: v for k, v in config["text_cfg"].items() if k != "tokenizer_kwargs"}
    return {**config, "text_cfg": text}


def _text_states(model: open_clip.CLIP, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states that condition diffusion and the last ones, each normalised (B, n, d).

    Encoded as open_clip does it, without the padding that no prompt of the batch needs.
    """
    length = int(tokens.argmax(-1).max()) + 1
    states = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    mask = model.attn_mask[:length, :length]
    read = states
    for layer, block in enumerate(model.transformer.resblocks, start=1):
        states = block(states, attn_mask=mask)
        read = states if layer == CONDITION_LAYERS else read
    return model.ln_final(read), model.ln_final(states)


def _pool(model: open_clip.CLIP, states: Tensor, tokens: Tensor) -> Tensor:
    ends = tokens.argmax(-1)
    pooled = states[torch.arange(len(tokens), device=tokens.device), ends]
    return (pooled @ model.text_projection).float()


def _encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    return _pool(model, _text_states(model, tokens)[1], tokens)


def _batch(seed: int, step: int, scenes: int) -> tuple[Tensor, list[str], Tensor, Tensor, Tensor]:
    """Return 2B pictures (2B, H, W, 3), 2B captions, goodness in 0..1 (2B, k), metrics (B,).

    Last come the sides (B, nouns) of the scenes' things, -1 where captions tell none.

    The first B pictures are as they should be, the others the same ones spoiled in one metric each;
    after their B captions come B that are wrong. At strength s goodness is 1 - s or so.
    """
    rng = np.random.default_rng([seed, step, 1])
    drawn = _scenes(rng, scenes)
    pictures = np.stack([draw(scene, rng) for scene in drawn])
    captions = [scene.caption for scene in drawn]
    wrong = [str(rng.choice(caption_negatives(scene, rng))) for scene in drawn]
    goodness = np.full((2 * scenes, len(METRICS)), 0.97, np.float32)
    odds = np.array([HARD_TO_SEE.get(metric.name, 1.0) for metric in METRICS])
    metrics = rng.choice(len(METRICS), size=scenes, p=odds / odds.sum())
    spoiled = []
    for i, (metric, strength) in enumerate(zip(metrics, rng.random(scenes).tolist(), strict=True)):
        picture = degrade(pictures[i].astype(np.float32) / 255, METRICS[metric].name, strength, rng)
        spoiled.append((picture * 255).round().astype(np.uint8))
        goodness[scenes + i, metric] = 0.03 + 0.94 * (1 - strength) ** 1.5
    truths = (goodness, metrics, np.stack([_sides(scene) for scene in drawn]))
    both = torch.from_numpy(np.concatenate([pictures, np.stack(spoiled)]))
    return both, captions + wrong, *map(torch.from_numpy, truths)


def _scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Return scenes, half of them in pairs of which one is the other with its sides exchanged."""
    scenes = [sample_scene(rng) for _ in range(count // 2)]
    while len(scenes) < count:
        scene = sample_scene(rng)
        turned = turned_round(scene, rng)
        if scene.relation and not held_out(turned):
            scenes += [scene, turned]
    return scenes[:count]


def _sides(scene: Scene) -> NDArray[np.int64]:
    """Return for every noun the relation, as an index, in which its things stand; -1 if none."""
    sides = np.full(len(NOUNS), -1)
    if scene.relation:
        first, *rest = scene.groups
        sides[NOUNS.index(first.noun)] = RELATIONS.index(scene.relation)
        for group in rest:
            sides[NOUNS.index(group.noun)] = RELATIONS.index(OPPOSITE[scene.relation])
    return sides


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
    """Return what conditions diffusion as transformers' class: the text tower's first layers.

    The same weights and the same hidden states; the last normalisation is that of the whole tower.
    """
    source = load_clip(folder).state_dict()
    vocabulary = source["token_embedding.weight"].shape[0]
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=CONDITION_LAYERS,
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
    for i in range(CONDITION_LAYERS):
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
    """Measure on 256 fresh scenes: retrieval R@1, shares of wrong captions preferred, mean AUROC.

    `fooled` is of captions with anything wrong, `turned` of those whose relation is turned round.
    The AUROC is of each metric on its own degradation at strength 0.5 against untouched pictures.
    """
    pictures, captions, scenes = batch_at(seed, 0, 256)
    rng = np.random.default_rng([seed, 1])
    wrong = [str(rng.choice(caption_negatives(scene, rng))) for scene in scenes]
    related = [i for i, scene in enumerate(scenes) if scene.relation]
    turned = [caption_negatives(scenes[i], rng)[0] for i in related]

    def image(batch: np.ndarray) -> Tensor:
        return F.normalize(model.encode_image(to_tensor(batch, device)), dim=-1)

    asked = encode(tokenizer, captions + wrong + turned).to(device)
    text = F.normalize(_encode_text(model, asked), dim=-1)
    similar = image(pictures) @ text.T  # (256, 512 and some)
    right = similar.diagonal()
    confused = similar[related, torch.arange(512, 512 + len(related))] > right[related]
    report = {
        "retrieval": (similar[:, :256].argmax(1).cpu() == torch.arange(256)).float().mean().item(),
        "fooled": (similar[:, 256:].diagonal() > right).float().mean().item(),
        "turned": confused.float().mean().item(),
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
