"""What ICIIA is measured beside: ways that need labels, of every client or of all together.

Fine-tuning and prompt tuning are the paper's (section 4.1, supplement A.2). The third has no client
in it: the backbone's head, trained on by the same pictures as the module. What ICIIA gains over
that is owed to context alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloud_server.training.iciia.learn import SEQUENCE, Cohort, Schedule, Steps
from cloud_server.training.iciia.samples import SPLITS, Ints

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

    parts = [np.concatenate(cohort.of(split)) for split in SPLITS[:3]]
    _descend(model, answer, cohort, schedule, seed, parts, schedule.clients)
    return share_right(answer, cohort, parts[2])


def head_trained_on(cohort: Cohort, classifier: nn.Linear, schedule: Schedule, seed: int) -> float:
    """Return the test accuracy of the backbone's head after the module's training pictures."""
    parts = [np.concatenate(cohort.of(split)) for split in SPLITS[:3]]
    answer = _head_of(cohort, classifier, schedule, seed, parts, schedule.clients)
    return share_right(answer, cohort, parts[2])


def fine_tuned(
    cohort: Cohort, classifier: nn.Linear, schedule: Schedule, seed: int, most: int | None = None
) -> float:
    """Return the test accuracy of the backbone's head trained on by each client's own labels.

    By `most` of them, drawn by the seed, None being all; what is chosen by validation is chosen by
    all labels of that split.
    """
    right, total, rng = 0.0, 0.0, np.random.default_rng((seed, 1))
    for client in cohort.of("test"):
        own = cohort.clients == cohort.clients[client[0]]
        parts = [np.flatnonzero(own & (cohort.splits == code)) for code in range(3)]
        parts[0] = rng.permutation(parts[0])[:most]
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
    cohort: Cohort,
    classifier: nn.Linear,
    schedule: Schedule,
    seed: int,
    parts: Sequence[Ints],
    at_once: int = 1,
) -> Answer:
    """Return the backbone's head trained on by the pictures `parts[0]`, chosen by `parts[1]`."""
    head = _copy_of(classifier)

    def answer(indices: Ints) -> Tensor:
        return head(cohort.features[indices])

    _descend(head, answer, cohort, schedule, seed, parts, at_once)
    return answer


def _descend(
    model: nn.Module,
    answer: Answer,
    cohort: Cohort,
    schedule: Schedule,
    seed: int,
    parts: Sequence[Ints],
    at_once: int,
) -> None:
    """Train as the module is, `at_once` times SEQUENCE pictures a step.

    The model is left as it was best on the validation pictures `parts[1]`, maybe at the start.
    """
    schedule, order = replace(schedule, clients=at_once), np.random.default_rng(seed)
    steps, labels = Steps(model, schedule), torch.from_numpy(cohort.labels)
    best, waited, kept = share_right(answer, cohort, parts[1]), 0, _state(model)
    for epoch in range(schedule.epochs):
        mixed = order.permutation(parts[0])
        cut = np.array_split(mixed, max(1, len(mixed) // (SEQUENCE * at_once)))
        for i, batch in enumerate(cut):
            loss = F.cross_entropy(answer(batch), labels[batch])
            progress = (epoch + i / len(cut)) / schedule.epochs
            steps.step(loss, progress, len(batch) / SEQUENCE)
        share, waited = share_right(answer, cohort, parts[1]), waited + 1
        if share > best:
            best, waited, kept = share, 0, _state(model)
        if schedule.over(waited):
            break
    model.load_state_dict(kept)


def _copy_of(classifier: nn.Linear) -> nn.Linear:
    head = nn.Linear(classifier.in_features, classifier.out_features)
    head.load_state_dict(classifier.state_dict())
    return head


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}
