"""The one training run (section 3.3): the backbone is frozen, every batch is of one client.

Beyond the paper a client's pictures are shuffled anew in every epoch and the length of batches
varies, because a device meets its pictures in any order and starts with few; a share of batches is
of everybody's pictures, because a device may meet those as well and must not be misled by them;
and a step goes by several batches side by side, none of which sees another, which costs a third.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from cloud_server.training.iciia.module import Iciia, IciiaConfig
from cloud_server.training.iciia.samples import SPLITS, Ints, by_client

SEQUENCE = 16  # pictures: 15 of history and the one asked for
SHORTEST, LONGEST = 1, 32
WARMUP = 0.05  # of the steps
Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The paper's settings (supplement A.2), its epochs and patience as upper bounds.

    With "sgd" the rate is constant and that of a step by one client; one by several, at most
    `clients`, goes as many times as far. With "adamw" it rises over the first twentieth and falls
    to nothing at the end, which a few epochs are enough for; there is no early stop, the best
    epoch is kept.
    """

    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.01
    clients: int = 16
    clip: float = 5.0
    epochs: int = 100
    patience: int = 10  # epochs without a gain that end an "sgd" run
    varied: float = 0.5  # share of batches that are of another length than SEQUENCE
    learn_head: bool = False  # the paper's way; few pictures a head learns by heart
    strangers: float = 0.25  # share of each client's pictures that are met among everybody's

    def over(self, waited: int) -> bool:
        """Whether so many epochs without a gain end the run."""
        return self.optimizer == "sgd" and waited >= self.patience


@dataclass(frozen=True, slots=True)
class Cohort:
    """Features (N, D) with labels, splits and clients (N,): what a module learns from."""

    features: Tensor
    labels: Ints
    splits: NDArray[np.int8]
    clients: Ints

    def of(self, split: str) -> Sequence[Ints]:
        """Return the indices of each client's pictures in a split."""
        return by_client(self.clients, np.flatnonzero(self.splits == SPLITS.index(split)))

    def digest(self) -> str:
        """Name the data, so that a run is only ever resumed on its own."""
        total = hashlib.sha256(self.features.numpy().tobytes())
        for values in (self.labels, self.splits, self.clients):
            total.update(values.tobytes())
        return total.hexdigest()


def train(
    cohort: Cohort,
    config: IciiaConfig,
    schedule: Schedule,
    seed: int,
    work: Path,
    *,
    start: nn.Linear | None = None,
    shown: bool = True,
) -> tuple[Iciia, float]:
    """Return the module of the best epoch and its accuracy on the validation split.

    It begins with the head `start`, the backbone's, and keeps it or trains it on, or learns a
    fresh one. The state after each epoch lies in `work`; the same call goes on from there after
    a kill.
    """
    torch.manual_seed(seed)
    model = Iciia(config)
    train_clients, val_clients = cohort.of("train"), cohort.of("val")
    if start is not None:
        model.begin_as(start, cohort.features[np.concatenate(train_clients)])
        model.head.requires_grad_(schedule.learn_head)
    steps = Steps(model, schedule)
    head = start is not None and digest_of(start)
    about = f"{config} {schedule} {seed} {cohort.digest()} {head}"
    file = work / f"iciia-{hashlib.sha256(about.encode()).hexdigest()[:16]}.pt"
    labels = torch.from_numpy(cohort.labels)
    epoch, best, waited = 0, -1.0, 0
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    if file.is_file():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        steps.optimizer.load_state_dict(state["optimizer"])
        kept, epoch, best, waited = (state[k] for k in ("kept", "epoch", "best", "waited"))
    with tqdm(total=schedule.epochs, initial=epoch, unit="epoch", disable=not shown) as bar:
        while epoch < schedule.epochs and not schedule.over(waited):
            torch.manual_seed(seed * 100_003 + epoch)  # dropout, also after a resume
            model.train()
            cut = list(stacks(train_clients, schedule, (seed, epoch)))
            for i, batch in enumerate(cut):
                logits = model(cohort.features[batch])
                loss = F.cross_entropy(logits.flatten(0, -2), labels[batch].flatten())
                steps.step(loss, (epoch + i / len(cut)) / schedule.epochs, len(batch))
            right = accuracy(model, cohort, val_clients)
            epoch, waited = epoch + 1, waited + 1
            if right > best:
                best, waited = right, 0
                kept = {k: v.clone() for k, v in model.state_dict().items()}
            state = {"kept": kept, "epoch": epoch, "best": best, "waited": waited}
            state |= {"model": model.state_dict(), "optimizer": steps.optimizer.state_dict()}
            _save(state, file)
            bar.set_postfix(val=f"{right:.2%}", best=f"{best:.2%}")
            bar.update()
    model.load_state_dict(kept)
    return model.eval(), best


class Steps:
    """Steps of the schedule's optimizer, by how much of the epochs is over."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.schedule = schedule
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if schedule.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.weights, lr=schedule.learning_rate)
        else:
            self.optimizer = torch.optim.AdamW(self.weights, lr=schedule.learning_rate, fused=True)

    def step(self, loss: Tensor, progress: float, clients: float) -> None:
        """Go by a loss that is the mean over so many clients' batches."""
        factor = clients
        if self.schedule.optimizer == "adamw":
            factor = min(1.0, progress / WARMUP, 0.5 + 0.5 * math.cos(math.pi * progress))
        self.optimizer.param_groups[0]["lr"] = self.schedule.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, self.schedule.clip)
        self.optimizer.step()


def batches(
    clients: Sequence[Ints], varied: float, seed: tuple[int, ...], strangers: float = 0.0
) -> Iterator[Ints]:
    """Yield every picture once, in batches of one client each, clients and pictures shuffled.

    Of each client's pictures a share of `strangers` is put together, as if of one client more.
    """
    rng = np.random.default_rng(seed)
    cut: list[Ints] = []

    def add(left: Ints) -> None:
        while len(left):
            length = SEQUENCE
            if rng.random() < varied:
                # Short ones as often as long ones, or none would learn to do without a history.
                length = int(np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST + 1))))
            cut.append(left[:length])
            left = left[length:]

    everybody: list[Ints] = []
    for client in clients:
        away, own = np.split(rng.permutation(client), [round(strangers * len(client))])
        everybody.append(away)
        add(own)
    add(rng.permutation(np.concatenate(everybody)))
    for i in rng.permutation(len(cut)):
        yield cut[i]


def stacks(clients: Sequence[Ints], schedule: Schedule, seed: tuple[int, ...]) -> Iterator[Ints]:
    """Yield batches of equal length side by side, (at most `schedule.clients`, length)."""
    waiting: dict[int, list[Ints]] = {}
    for batch in batches(clients, schedule.varied, seed, schedule.strangers):
        same = waiting.setdefault(len(batch), [])
        same.append(batch)
        if len(same) == schedule.clients:
            yield np.stack(waiting.pop(len(batch)))
    rest = list(waiting.values())
    for i in np.random.default_rng(seed).permutation(len(rest)):
        yield np.stack(rest[i])


@torch.inference_mode()
def accuracy(model: Iciia, cohort: Cohort, clients: Sequence[Ints]) -> float:
    """Return the share named rightly, 16 of a client at a time (the paper's batch mode)."""
    model.eval()
    labels, by_length = torch.from_numpy(cohort.labels), dict[int, list[Ints]]()
    for batch in batches(clients, 0.0, (0,)):
        by_length.setdefault(len(batch), []).append(batch)
    right = total = 0
    for several in by_length.values():
        for part in np.array_split(np.stack(several), max(1, len(several) // 64)):
            named = model(cohort.features[part]).argmax(-1)
            right += int((named == labels[part]).sum())
            total += part.size
    return right / total


@dataclass(frozen=True, slots=True)
class Stream:
    """Targets (n,) and for each the pictures that its client met before, (n, k)."""

    targets: Ints
    before: Ints


def stream(clients: Sequence[Ints], k: int, seed: int, most: int | None = None) -> Stream:
    """Return targets with k random other pictures of their client, in the order they came.

    Clients of k pictures or fewer have none to give and are left out. `most` targets are drawn.
    """
    rng = np.random.default_rng((seed, k))
    able = [client for client in clients if len(client) > k]
    rows = [
        np.concatenate([[client[i]], rng.choice(np.delete(client, i), k, replace=False)])
        for client in able
        for i in range(len(client))
    ]
    whole = np.array(rows, np.int64).reshape(-1, k + 1)
    if most is not None and len(whole) > most:
        whole = whole[np.sort(rng.choice(len(whole), most, replace=False))]
    return Stream(whole[:, 0], whole[:, 1:])


@torch.inference_mode()
def answers(model: nn.Module, features: Tensor, met: Stream) -> Tensor:
    """Return what `model(sequence, row)` says of every target after its history, (n, ...)."""
    model.eval()
    k = met.before.shape[1]
    rows, said = torch.tensor([k]), []
    indices = np.concatenate([met.before, met.targets[:, None]], 1)
    for part in np.array_split(indices, max(1, len(indices) * (k + 1) // 8192)):
        said.append(model(features[part], rows)[:, 0])
    return torch.cat(said)


def digest_of(head: nn.Linear) -> str:
    """Return the digest of a head's weights."""
    return hashlib.sha256(head.weight.detach().numpy().tobytes()).hexdigest()


def _save(state: dict[str, object], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, file)
