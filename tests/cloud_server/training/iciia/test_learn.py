"""Training finds what only the client tells, and resumes where it was killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cloud_server.training.iciia import learn
from cloud_server.training.iciia.learn import (
    Cohort,
    Optimizer,
    Schedule,
    Steps,
    answers,
    batches,
    stacks,
    stream,
    train,
)
from cloud_server.training.iciia.module import Iciia, IciiaConfig

CONFIG = IciiaConfig(width=32, classes=40, layers=1, groups=2)
FAST = Schedule(learning_rate=0.05, clients=1, epochs=12)


def test_every_batch_is_of_one_client_and_every_picture_comes_once() -> None:
    clients = [np.arange(0, 50), np.arange(50, 57), np.arange(57, 60)]
    owner = np.repeat([0, 1, 2], [50, 7, 3])
    seen = list(batches(clients, 0.5, (0, 0)))
    assert sorted(np.concatenate(seen).tolist()) == list(range(60))
    assert all(len(set(owner[batch])) == 1 for batch in seen)
    again = list(batches(clients, 0.5, (0, 0)))
    assert all((a == b).all() for a, b in zip(seen, again, strict=True))
    later = np.concatenate(list(batches(clients, 0.5, (0, 1))))
    assert not (later == np.concatenate(seen)).all()


def test_strangers_meet_and_every_picture_comes_once_all_the_same() -> None:
    clients = [np.arange(0, 64), np.arange(64, 128)]
    seen = list(batches(clients, 0.0, (0,), strangers=0.25))
    assert sorted(np.concatenate(seen).tolist()) == list(range(128))
    together = [batch for batch in seen if len(set(batch // 64)) == 2]
    assert sorted(np.concatenate(together) // 64) == [0] * 16 + [1] * 16


def test_lengths_vary_where_asked_for() -> None:
    clients = [np.arange(2000)]
    assert {len(b) for b in batches(clients, 0.0, (0,))} == {16}
    lengths = [len(b) for b in batches(clients, 1.0, (0,))][:]
    assert max(lengths) > 25
    assert min(lengths) < 6


def test_clients_side_by_side_lose_and_mix_nothing() -> None:
    clients = [np.arange(100 * i, 100 * i + 37) for i in range(9)]
    schedule, seen = Schedule(clients=4, varied=0.3, strangers=0.0), []
    for stack in stacks(clients, schedule, (0, 1)):
        assert len(stack) <= 4
        assert all(len(set(row // 100)) == 1 for row in stack)
        seen.append(stack.ravel())
    assert sorted(np.concatenate(seen)) == sorted(np.concatenate(clients))


def test_a_target_is_never_in_its_own_history() -> None:
    clients = [np.arange(20), np.arange(20, 25)]
    met = stream(clients, 5, seed=0)
    assert met.before.shape == (20, 5)  # the second client has too few
    assert not (met.before == met.targets[:, None]).any()
    assert all(len(set(row)) == 5 for row in met.before)


def test_asking_one_by_one_is_asking_for_that_row_of_the_whole(cohort: Cohort) -> None:
    torch.manual_seed(0)
    model = Iciia(CONFIG).eval()
    met = stream(cohort.of("test"), 6, seed=1)
    said = answers(model, cohort.features, met)
    indices = np.append(met.before[7], met.targets[7])
    with torch.inference_mode():
        whole = model(cohort.features[indices])
    torch.testing.assert_close(said[7], whole[-1], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def trained(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Iciia:
    return train(cohort, CONFIG, FAST, 0, tmp_path_factory.mktemp("work"), shown=False)[0]


def test_history_tells_what_the_picture_alone_does_not(trained: Iciia, cohort: Cohort) -> None:
    labels = torch.from_numpy(cohort.labels)
    right = {}
    for k in (0, 8):
        met = stream(cohort.of("test"), k, seed=0)
        named = answers(trained, cohort.features, met).argmax(-1)
        right[k] = (named == labels[met.targets]).float().mean().item()
    assert right[8] > right[0] + 0.05


def test_a_step_of_sgd_goes_as_far_as_its_clients_would_one_by_one() -> None:
    def moved(clients: float) -> float:
        weight = nn.Linear(1, 1, bias=False)
        before = weight.weight.item()
        Steps(weight, Schedule(clients=16)).step(weight.weight.sum(), 0.0, clients)
        return before - weight.weight.item()

    assert moved(1) == pytest.approx(0.01, rel=1e-4)
    assert moved(16) == pytest.approx(0.16, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_run_ends_where_an_unbroken_one_does(
    cohort: Cohort, optimizer: Optimizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(optimizer, 0.01, clients=4, epochs=4)
    start = nn.Linear(32, 40)
    unbroken, _ = train(cohort, CONFIG, schedule, 0, tmp_path / "a", start=start, shown=False)
    seen = 0

    def killed(*args: object) -> float:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt
        return accuracy(*args)

    accuracy = learn.accuracy
    monkeypatch.setattr(learn, "accuracy", killed)
    with pytest.raises(KeyboardInterrupt):
        train(cohort, CONFIG, schedule, 0, tmp_path / "b", start=start, shown=False)
    monkeypatch.undo()
    model, _ = train(cohort, CONFIG, schedule, 0, tmp_path / "b", start=start, shown=False)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, unbroken.state_dict()[name]), name


@pytest.mark.parametrize("learn_head", [False, True])
def test_the_backbones_head_is_kept_or_trained_on(
    cohort: Cohort, learn_head: bool, tmp_path: Path
) -> None:
    start = nn.Linear(32, 40)
    schedule = replace(FAST, epochs=1, learn_head=learn_head)
    model, _ = train(cohort, CONFIG, schedule, 0, tmp_path, start=start, shown=False)
    assert torch.equal(model.head.weight, start.weight) != learn_head


def test_other_data_or_settings_never_resume_a_run(cohort: Cohort, tmp_path: Path) -> None:
    short = replace(FAST, epochs=1)
    train(cohort, CONFIG, short, 0, tmp_path, shown=False)
    train(
        replace(cohort, labels=cohort.labels[::-1].copy()), CONFIG, short, 0, tmp_path, shown=False
    )
    train(cohort, replace(CONFIG, groups=1), short, 0, tmp_path, shown=False)
    assert len(list(tmp_path.glob("iciia-*.pt"))) == 3
