"""What ICIIA is measured beside: ways that need labels, of every client or of all together.

Fine-tuning and prompt tuning are the paper's (section 4.1, supplement A.2). The third has no client
in it: the backbone's head, trained on by the same pictures as the module. What ICIIA gains over
that is owed to context alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloud_server.training.iciia.learn import SEQUENCE, Cohort, Schedule, batches
from cloud_server.training.iciia.samples import Ints

Answer = Callable[[Ints], Tensor]  # indices (n,) to logits (n, C)


class Prompted(nn.Module):
    """A head with a learnt vector e of each client: logits = W x + b + V e + c.

    The vector is half as wide as the features; W and b start as the backbone's.
    """

    def __init__(self, classifier: nn.Linear, clients: int) -> None:
        super().__init__()
        self.head = _copy_of(classifier)
        self.prompts = nn.Embedding(clients, classifier.in_features // 2)
        self.prompted = nn.Linear(classifier.in_features // 2, classifier.out_features)

    def forward(self, features: Tensor, clients: Tensor) -> Tensor:
        return self.head(features) + self.prompted(self.prompts(clients))


def prompt_tuned(cohort: Cohort, classifier: nn.Linear, schedule: Schedule, seed: int) -> float:
    """Return the test accuracy with a prompt of every client, learnt by all of them together."""
    torch.manual_seed(seed)
    model = Prompted(classifier, int(cohort.clients.max()) + 1)
    clients = torch.from_numpy(cohort.clients)

    def answer(indices: Ints) -> Tensor:
        return model(cohort.features[indices], clients[indices])

    train = cohort.of("train")
    _descend(
        model,
        answer,
        cohort,
        schedule,
        lambda epoch: batches(train, 0.0, (seed, epoch)),
        np.concatenate(cohort.of("val")),
    )
    return share_right(answer, cohort, np.concatenate(cohort.of("test")))


def head_trained_on(cohort: Cohort, classifier: nn.Linear, schedule: Schedule, seed: int) -> float:
    """Return the test accuracy of the backbone's head after the module's training pictures."""
    parts = [np.concatenate(cohort.of(split)) for split in ("train", "val", "test")]
    return share_right(_head_of(cohort, classifier, schedule, seed, parts), cohort, parts[2])


def fine_tuned(cohort: Cohort, classifier: nn.Linear, schedule: Schedule, seed: int) -> float:
    """Return the test accuracy of the backbone's head trained on by each client's own labels."""
    right = total = 0.0
    for client in cohort.of("test"):
        own = cohort.clients == cohort.clients[client[0]]
        parts = [np.flatnonzero(own & (cohort.splits == code)) for code in range(3)]
        head = _head_of(cohort, classifier, schedule, seed, parts)
        right += share_right(head, cohort, parts[2]) * len(client)
        total += len(client)
    return right / total


@torch.inference_mode()
def share_right(answer: Answer, cohort: Cohort, indices: Ints) -> float:
    """Return the share of pictures that are named rightly; 0 of none."""
    if not len(indices):
        return 0.0
    named = answer(indices).argmax(-1)
    return float((named == torch.from_numpy(cohort.labels[indices])).float().mean())


def _head_of(
    cohort: Cohort, classifier: nn.Linear, schedule: Schedule, seed: int, parts: list[Ints]
) -> Answer:
    """Return the head trained on by the first of `parts`, the epoch chosen by the second."""
    head, order = _copy_of(classifier), np.random.default_rng(seed)

    def answer(indices: Ints) -> Tensor:
        return head(cohort.features[indices])

    def cut(_: int) -> Iterator[Ints]:
        mixed = order.permutation(parts[0])
        return iter(np.array_split(mixed, max(1, len(mixed) // SEQUENCE)))

    _descend(head, answer, cohort, schedule, cut, parts[1])
    return answer


def _descend(
    model: nn.Module,
    answer: Answer,
    cohort: Cohort,
    schedule: Schedule,
    batches_of: Callable[[int], Iterable[Ints]],
    val: Ints,
) -> None:
    """Train to the schedule and leave the model as it was best on `val`, maybe at the start."""
    optimizer = torch.optim.SGD(model.parameters(), lr=schedule.learning_rate)
    labels = torch.from_numpy(cohort.labels)
    best, waited, kept = share_right(answer, cohort, val), 0, _state(model)
    for epoch in range(schedule.epochs):
        for batch in batches_of(epoch):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(answer(batch), labels[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            optimizer.step()
        share, waited = share_right(answer, cohort, val), waited + 1
        if share > best:
            best, waited, kept = share, 0, _state(model)
        if waited >= schedule.patience:
            break
    model.load_state_dict(kept)


def _copy_of(classifier: nn.Linear) -> nn.Linear:
    head = nn.Linear(classifier.in_features, classifier.out_features)
    head.load_state_dict(classifier.state_dict())
    return head


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}
