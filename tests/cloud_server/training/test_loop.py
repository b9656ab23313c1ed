"""The training loop: budgets, and resuming as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cloud_server.errors import ConfigError, DataError
from cloud_server.training.loop import Budget, KernelMuon, Prefetch, fit


class Killed(Exception):
    """Stands for the end of a process in the middle of training."""


def _task(kill_at: int | None = None):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == kill_at:
            raise Killed
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    return model, loss_fn


def _fit(model: nn.Module, loss_fn, work: Path, steps: int, **options):
    return fit(
        "line", model, loss_fn, lr=0.05, budget=Budget(steps=steps), work=work, device="cpu",
        warmup=5, **options,
    )  # fmt: skip


def test_a_budget_needs_steps_or_minutes():
    with pytest.raises(ValueError, match="--steps or --minutes"):
        Budget()


def test_a_budget_ends_with_whichever_comes_first():
    both = Budget(steps=100, minutes=1)
    assert both.progress(step=50, elapsed_s=6) == pytest.approx(0.5)
    assert both.progress(step=1, elapsed_s=60) == pytest.approx(1.0)


def test_training_lowers_the_loss(tmp_path):
    model, loss_fn = _task()
    before = loss_fn(10_000)[0].item()
    _fit(model, loss_fn, tmp_path, 150)
    assert loss_fn(10_000)[0].item() < before / 20


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch, ema):
    monkeypatch.setattr("cloud_server.training.loop.CHECKPOINT_EVERY_S", 0.0)
    whole = _fit(*_task(), tmp_path / "whole", 40, ema=ema)
    with pytest.raises(Killed):
        _fit(*_task(kill_at=25), tmp_path / "cut", 40, ema=ema)
    resumed = _fit(*_task(), tmp_path / "cut", 40, ema=ema)
    assert torch.equal(whole.weight, resumed.weight)


def test_what_learns_beside_the_model_is_resumed_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("cloud_server.training.loop.CHECKPOINT_EVERY_S", 0.0)

    def train(folder: str, kill_at: int | None = None) -> nn.Module:
        model, loss_fn = _task(kill_at)
        beside = nn.Linear(1, 1)
        learner = torch.optim.AdamW(beside.parameters(), lr=0.1)

        def both(step: int) -> tuple[Tensor, dict[str, float]]:
            loss, shown = loss_fn(step)
            learner.zero_grad()
            (beside(loss.detach().view(1)) - loss.detach()).square().sum().backward()
            learner.step()
            return loss, shown

        _fit(model, both, tmp_path / folder, 40, beside=(beside, learner))
        return beside

    whole = train("whole")
    with pytest.raises(Killed):
        train("cut", kill_at=25)
    assert torch.equal(train("cut").weight, whole.weight)


def test_a_killed_run_resumes_with_muon_too(tmp_path, monkeypatch):
    monkeypatch.setattr("cloud_server.training.loop.CHECKPOINT_EVERY_S", 0.0)

    def train(folder: str, kill_at: int | None = None) -> nn.Module:
        model, loss_fn = _task(kill_at)
        return _fit(model, loss_fn, tmp_path / folder, 40, hidden=[model.weight])

    whole = train("whole")
    with pytest.raises(Killed):
        train("cut", kill_at=25)
    assert torch.equal(whole.weight, train("cut").weight)


def test_muon_moves_a_kernel_in_place_by_an_orthogonal_step():
    kernel = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last).weight
    before, where = kernel.detach().clone(), kernel.data_ptr()
    optimizer = KernelMuon([kernel], lr=0.1, weight_decay=0.0)
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert kernel.data_ptr() == where
    values = torch.linalg.svdvals((kernel.detach() - before).flatten(1))
    assert values.min() > 0.6 * values.max()


def test_muon_refuses_a_kernel_it_cannot_see_as_a_matrix():
    with pytest.raises(ValueError, match="no matrix views a weight of strides"):
        KernelMuon([nn.Conv2d(8, 4, 3).weight], lr=0.1, weight_decay=0.0)


def test_a_finished_run_is_not_trained_further(tmp_path):
    model, loss_fn = _task()
    done = _fit(model, loss_fn, tmp_path, 10).weight.clone()
    again = _fit(*_task(kill_at=10), tmp_path, 10)
    assert torch.equal(done, again.weight)


def test_the_average_is_what_gets_shipped_and_training_goes_on_from_the_raw_weights(tmp_path):
    shipped: list[Tensor] = []
    model, loss_fn = _task()
    final = _fit(
        model,
        loss_fn,
        tmp_path,
        30,
        ema=0.99,
        on_checkpoint=lambda m: shipped.append(m.weight.clone()),
    )
    state = torch.load(tmp_path / "line.pt", weights_only=True)
    assert torch.equal(shipped[-1], state["average"]["weight"])
    assert torch.equal(final.weight, state["average"]["weight"])
    assert not torch.equal(state["model"]["weight"], state["average"]["weight"])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # the workers themselves need no GPU
def test_data_made_ahead_are_those_of_the_step_asked_for(device):
    data = Prefetch(lambda step: torch.full((2,), step), device)
    assert [data(step)[0].item() for step in (3, 4, 5, 9, 10, 0)] == [3, 4, 5, 9, 10, 0]


def test_losses_of_all_steps_are_drawn_also_those_before_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr("cloud_server.training.loop.CHECKPOINT_EVERY_S", 0.0)
    with pytest.raises(Killed):
        _fit(*_task(kill_at=25), tmp_path, 40)
    _fit(*_task(), tmp_path, 40)
    state = torch.load(tmp_path / "line.pt", weights_only=True)
    assert state["shown_at"] == [20, 40]
    losses = state["history"]["loss"]
    assert len(losses) == 2
    assert losses[0] > losses[-1]
    with Image.open(tmp_path / "line-losses.png") as plot:
        assert plot.format == "PNG"
        assert len(set(plot.convert("L").tobytes())) > 10  # a drawn line, not an empty sheet


def test_a_state_of_another_training_is_refused(tmp_path):
    model, loss_fn = _task()
    _fit(model, loss_fn, tmp_path, 3, about={"seed": 0, "start": "abc"})
    kept = (tmp_path / "line.pt").read_bytes()
    told = "holds a training with seed 0, start abc, not with seed 5, start none; remove it"
    with pytest.raises(ConfigError, match=told):
        _fit(model, loss_fn, tmp_path, 6, about={"seed": 5, "start": "none"})
    assert (tmp_path / "line.pt").read_bytes() == kept


def test_a_damaged_state_is_named(tmp_path):
    model, loss_fn = _task()
    _fit(model, loss_fn, tmp_path, 3)
    whole = (tmp_path / "line.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no state"):
        (tmp_path / "line.pt").write_bytes(damaged)
        with pytest.raises(DataError, match=r"training in .*line\.pt is damaged; remove it"):
            _fit(model, loss_fn, tmp_path, 6)


def test_a_model_folder_that_a_kill_left_unfinished_is_in_nobodys_way(tmp_path):
    (tmp_path / "line.partial").mkdir()
    model, loss_fn = _task()
    _fit(model, loss_fn, tmp_path, 3)
    assert (tmp_path / "line.pt").is_file()
