"""Training finds what only the client tells, resumes where it was killed, and gates itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cloud_server.training.iciia import learn
from cloud_server.training.iciia.gate import SIGNS, Gate, fit_gate
from cloud_server.training.iciia.learn import (
    Cohort,
    Optimizer,
    Schedule,
    answers,
    batches,
    stacks,
    stream,
    train,
)
from cloud_server.training.iciia.module import Iciia, IciiaConfig
from cloud_server.training.iciia.samples import mixed_clients

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


def test_lengths_vary_where_asked_for() -> None:
    clients = [np.arange(2000)]
    assert {len(b) for b in batches(clients, 0.0, (0,))} == {16}
    lengths = [len(b) for b in batches(clients, 1.0, (0,))][:]
    assert max(lengths) > 25
    assert min(lengths) < 6


def test_clients_side_by_side_lose_and_mix_nothing() -> None:
    clients = [np.arange(100 * i, 100 * i + 37) for i in range(9)]
    schedule, seen = Schedule(clients=4, varied=0.3), []
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
    assert right[8] > right[0] + 0.1


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


def test_the_gates_signs_are_what_their_names_say() -> None:
    torch.manual_seed(0)
    gate, x = Gate(16), torch.randn(6, 16)
    signs = dict(zip(SIGNS, gate.signs(x, torch.tensor([2]))[0].tolist(), strict=True))
    unit = x / x.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).numpy()
    assert signs["own"] == pytest.approx(cosines[2].mean(), abs=1e-5)
    assert signs["crowd"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert signs["share"] == pytest.approx(1 / 6)
    assert signs["one"] == 1.0


def test_the_gate_stays_shut_where_the_module_is_never_alone_right_or_wrong(
    trained: Iciia, cohort: Cohort
) -> None:
    nothing_right = replace(cohort, labels=np.full(len(cohort.labels), trained.config.classes))
    plain = torch.zeros(len(cohort.labels), dtype=torch.int64)
    gate = fit_gate(trained, plain, nothing_right, seed=0)
    assert not gate.weights.any()


def test_the_gate_opens_for_a_client_and_not_for_a_crowd(trained: Iciia, cohort: Cohort) -> None:
    # This backbone tells the pairs apart by the toss of a coin that favours the odd ones.
    plain = torch.from_numpy(cohort.labels // 2 * 2 + (np.arange(len(cohort.labels)) % 3 == 0))
    gate = fit_gate(trained, plain, cohort, seed=0)
    labels = torch.from_numpy(cohort.labels)
    gains = {}
    for level in (0.0, 1.0):
        mixed = mixed_clients(cohort.clients, cohort.splits, level, 5)
        met = stream(replace(cohort, clients=mixed).of("test"), 8, seed=2)
        asked = answers(gate, cohort.features, met) > 0
        named = torch.where(
            asked, answers(trained, cohort.features, met).argmax(-1), plain[met.targets]
        )
        before = (plain[met.targets] == labels[met.targets]).float().mean()
        gains[level] = ((named == labels[met.targets]).float().mean() - before).item()
    assert gains[1.0] > 0.1
    assert gains[0.0] > -0.05
