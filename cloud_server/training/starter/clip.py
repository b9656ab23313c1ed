"""The starter CLIP: an open_clip model trained on captions and on the ten quality pairs.

The first layers of its text tower, frozen, condition both diffusion models and feed the router, as
Stable Diffusion 2 leaves out the last one; the whole measures quality. Both towers are learnt
together first, until those layers are locked, as the diffusion models will need them; then the
picture tower and the text tower's other layers learn on.
Captions with one thing wrong (sides, colours, counts, nouns, places) stand in every batch, because
a contrastive encoder otherwise forgets word order. Which thing is on which side it still does not
learn: as long as neither tower knows, the other has nothing to learn it from. So both are asked for
it, first of two things and few nouns: what holds for six is soon found and then for all, while from
a hundred at once, on a CPU, nothing was learnt.
What conditions diffusion are the states of all tokens, and of these the contrast trains the last
alone: nouns then lie in few directions and next to "red" hardly differ. So every state then learns
to recall its own token and those before it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cloud_server.torchvision_guard import guard
from cloud_server.training.loop import Budget, Prefetch, fit
from cloud_server.training.precision import autocast
from cloud_server.training.starter.autoencoder import to_tensor
from cloud_server.training.starter.clip_data import METRICS, Batch, make_batch, make_pairs
from cloud_server.training.starter.clip_model import (
    CONDITION_LAYERS,
    WIDTH,
    Config,
    encode_text,
    load_clip,
    model_arguments,
    model_config,
    pool,
    save_clip,
    text_states,
)
from cloud_server.training.starter.degradations import degrade
from cloud_server.training.starter.scenes import (
    NOUNS,
    RELATIONS,
    batch_at,
    caption_negatives,
    sample_scene,
)
from cloud_server.training.starter.tokenizer import encode

guard()
import open_clip  # noqa: E402  the guard must come first
from transformers import CLIPTokenizer  # noqa: E402

BATCH = {"cpu": 48, "cuda": 192}  # scenes, each as it is and spoiled
PAIRS = {"cpu": 32, "cuda": 128}  # of scenes with their sides exchanged
FEW, FEW_UNTIL, DOUBLED_IN = 6, 130, 50  # nouns at first, and steps
CAPTIONS = {"cpu": 128, "cuda": 512}  # a batch of what needs no pictures
STAGES = {"clip": (0, 8e-4), "clip-top": (1_000_000, 8e-4)}  # where data begin; rate
LOCKED_FROM = 0.6  # of the budget
RECALL_SHARE = 0.3  # of what is left then
SIDES_SHARE = 0.35  # of what is left after that
SIDES_SCALE = 16.0  # of the cosine of an embedding and a side's code
REMEMBERED = 4  # tokens that each state recalls: its own and those before it
RECALL_SCALE = 16.0  # of the cosine of a state and a token's code
POLES = [text for metric in METRICS for text in (metric.positive, metric.negative)]


def train_clip(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Train both towers; write an open_clip folder to `out`, which holds the tokenizer already."""
    both, later = budget.split(LOCKED_FROM)
    recall, rest = later.split(RECALL_SHARE)
    sides, top = rest.split(SIDES_SHARE)
    train_towers(out, work, both, seed, device)
    train_recall(out, work, recall, seed, device)
    train_sides(out, work, sides, seed, device)
    train_top(out, work, top, seed, device)


def train_towers(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Train a text tower and a small vision transformer together, from nothing."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(out)
    config = model_config(len(tokenizer))
    model = open_clip.CLIP(**model_arguments(config))
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
            wanted = encode_text(before, tokens)
        with sdpa_kernel(SDPBackend.MATH):
            states, last = text_states(model, tokens)
        moved = 1 - F.cosine_similarity(pool(model, last, tokens), wanted).mean()
        forgotten = trained["recall"](states, tokens[:, : states.shape[1]])
        shown = {"forgotten": forgotten.item(), "moved": moved.item()}
        return forgotten + 10 * moved, shown

    fit(
        "clip-recall", trained, loss_fn, lr=8e-4, budget=budget, work=work, device=device,
        ema=0.99, warmup=50, on_checkpoint=lambda _: save_clip(model, config, out),
        about={"seed": seed},
    )  # fmt: skip


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


def train_sides(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Teach both towers in the folder `out` which thing is on which side.

    Nouns come in one after the other, then other numbers of things than two. What other models read
    stays as it is, as in `train_top`.
    """
    torch.manual_seed(seed)
    model, config, tokenizer = _open_to_learn(out)
    trained = nn.ModuleDict({"clip": model, "sides": Sides()})
    kind = torch.device(device).type

    def make(step: int) -> tuple[Tensor, Tensor, Tensor]:
        nouns = nouns_at(step)
        objects = 2 if nouns < len(NOUNS) else None
        return make_pairs(tokenizer, seed, step, PAIRS[kind], nouns, objects)

    data = Prefetch(make, device)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures, *others = data(step)
        tokens, sides = (value.to(device) for value in others)
        with sdpa_kernel(SDPBackend.MATH), autocast(kind):
            image = F.normalize(model.encode_image(to_tensor(pictures, device)).float(), dim=-1)
            text = F.normalize(encode_text(model, tokens), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        truth = torch.arange(len(logits), device=device)
        contrast = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        seen, told = (trained["sides"](embeddings, sides) for embeddings in (image, text))
        shown = {"contrast": contrast, "seen": seen, "told": told}
        return contrast + seen + told, {name: value.item() for name, value in shown.items()}

    fit(
        "clip-sides", trained, loss_fn, lr=1e-3, budget=budget, work=work, device=device,
        ema=0.99, warmup=40, weight_decay=0.05, hidden=_matrices(model),
        on_checkpoint=lambda _: save_clip(model, config, out), about={"seed": seed},
    )  # fmt: skip


def nouns_at(step: int) -> int:
    """Return how many nouns `train_sides` knows at a step."""
    return min(len(NOUNS), int(FEW * 2 ** max(0.0, (step - FEW_UNTIL) / DOUBLED_IN)))


def train_top(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Let all in the folder `out` learn on but what other models read, which stays to the last bit.

    That is the embeddings, the first layers and the last normalisation of the text tower.
    """
    torch.manual_seed(seed)
    model, config, tokenizer = _open_to_learn(out)
    _fit("clip-top", model, config, tokenizer, out, work, budget, seed, device)


def _open_to_learn(out: Path) -> tuple[open_clip.CLIP, Config, CLIPTokenizer]:
    """Open a folder so that only what no other model reads will learn."""
    config = json.loads((out / "open_clip_config.json").read_text())["model_cfg"]
    model = load_clip(out)
    model.requires_grad_(False)
    for part in (model.visual, model.transformer.resblocks[CONDITION_LAYERS:]):
        part.requires_grad_(True)
    model.text_projection.requires_grad_(True)
    return model, config, CLIPTokenizer.from_pretrained(out)


def _matrices(model: open_clip.CLIP) -> list[Tensor]:
    """Return the weights of both towers' layers that learn and that Muon takes."""
    layers = (model.visual.transformer.resblocks, model.transformer.resblocks)
    return [w for part in layers for w in part.parameters() if w.ndim == 2 and w.requires_grad]


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

    def make(step: int) -> Batch:
        return make_batch(tokenizer, seed, first + step, BATCH[kind])

    data = Prefetch(make, device)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures, *others = data(step)
        tokens, goodness, spoiled = (value.to(device) for value in others)
        # On a CPU the fused attention's backward pass takes three quarters of a step.
        with sdpa_kernel(SDPBackend.MATH), autocast(kind):
            image = F.normalize(model.encode_image(to_tensor(pictures, device)).float(), dim=-1)
            text = F.normalize(encode_text(model, tokens), dim=-1)
            poles = F.normalize(encode_text(model, pairs), dim=-1)
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

    def save(_: nn.Module) -> None:  # at that moment `model` has the weights to ship
        save_clip(model, config, out)
        report = evaluate_clip(model, tokenizer, seed + 1, device)
        print(f"\n{name}:", json.dumps(report), flush=True)

    fit(
        name, model, loss_fn, lr=rate, budget=budget, work=work, device=device,
        ema=0.997, warmup=100, weight_decay=0.05, hidden=_matrices(model), on_checkpoint=save,
        about={"seed": seed},
    )  # fmt: skip


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
    text = F.normalize(encode_text(model, asked), dim=-1)
    similar = image(pictures) @ text.T  # (256, 512 and some)
    right = similar.diagonal()
    confused = similar[related, torch.arange(512, 512 + len(related))] > right[related]
    report = {
        "retrieval": (similar[:, :256].argmax(1).cpu() == torch.arange(256)).float().mean().item(),
        "fooled": (similar[:, 256:].diagonal() > right).float().mean().item(),
        "turned": confused.float().mean().item(),
    }
    aurocs = []
    poles = F.normalize(encode_text(model, encode(tokenizer, POLES).to(device)), dim=-1)
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
