"""Labels help where they should: by client, by all together, and never for the worse on `val`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cloud_server.training.iciia.baselines import (
    Prompted,
    fine_tuned,
    head_trained_on,
    prompt_tuned,
    share_right,
)
from cloud_server.training.iciia.learn import Cohort, Schedule

SCHEDULE = Schedule(learning_rate=0.1, epochs=20)


@pytest.fixture(scope="module")
def classifier(cohort: Cohort) -> nn.Linear:
    """Knows the pair of every picture, and of the two always says the even one."""
    head = nn.Linear(32, 40)
    centres = [cohort.features[cohort.labels // 2 == i].mean(0) for i in range(20)]
    with torch.no_grad():
        head.weight.copy_(torch.stack(centres).repeat_interleave(2, 0))
        head.bias.copy_(-head.weight.square().sum(1) / 2)
        head.bias[::2] += 1e-3
    return head


def test_labels_of_a_client_tell_its_kind(cohort: Cohort, classifier: nn.Linear) -> None:
    everyone = np.concatenate(cohort.of("test"))
    plain = share_right(lambda i: classifier(cohort.features[i]), cohort, everyone)
    assert plain == pytest.approx(0.5, abs=0.07)
    assert fine_tuned(cohort, classifier, SCHEDULE, 0) > plain + 0.15
    assert prompt_tuned(cohort, classifier, SCHEDULE, 0) > plain + 0.15
    assert plain < fine_tuned(cohort, classifier, SCHEDULE, 0, most=4) < plain + 0.15


def test_a_head_without_clients_learns_from_all(cohort: Cohort, classifier: nn.Linear) -> None:
    one = replace(cohort, clients=np.zeros_like(cohort.clients))
    shares = [head_trained_on(c, classifier, SCHEDULE, 0) for c in (cohort, one)]
    assert shares[0] > 0.6
    assert abs(shares[0] - shares[1]) < 0.08  # whose they are plays no part


def test_no_step_for_the_worse_is_kept(cohort: Cohort, classifier: nn.Linear) -> None:
    everyone = np.concatenate(cohort.of("test"))
    plain = share_right(lambda i: classifier(cohort.features[i]), cohort, everyone)
    wild = Schedule(learning_rate=1e4, clip=1e9, epochs=2)
    assert head_trained_on(cohort, classifier, wild, 0) >= plain - 0.05


def test_a_prompt_moves_the_answers_of_its_client_alone(classifier: nn.Linear) -> None:
    torch.manual_seed(0)
    model, x = Prompted(classifier, 3), torch.randn(4, 32)
    who = torch.tensor([0, 1, 2, 0])
    before = model(x, who)
    with torch.no_grad():
        model.prompts.weight[1] += 1.0
    moved = (model(x, who) - before).abs().amax(1) > 0
    assert moved.tolist() == [False, True, False, False]
