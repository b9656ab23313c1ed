"""The one training loop: budgeted, seeded, resumable after a kill, the same on CPU and CUDA."""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cloud_server.errors import ConfigError, DataError

CHECKPOINT_EVERY_S = 300.0
SHOWN_EVERY = 20  # steps, whose mean is shown
BAR = "{desc}: {percentage:5.1f}%|{bar:20}| {elapsed}<{remaining}{postfix}"


@dataclass(frozen=True, slots=True)
class Budget:
    """When training ends: after `steps`, after `minutes` of wall-clock time, or whichever is first.

    Minutes are summed over resumed runs, so a killed run does not start its time again.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("a training budget needs steps or minutes; give --steps or --minutes")

    def split(self, share: float) -> tuple[Budget, Budget]:
        """Return two budgets that spend this one, `share` of it first."""
        steps = None if self.steps is None else max(1, round(share * self.steps))
        minutes = None if self.minutes is None else share * self.minutes
        rest = None if steps is None or self.steps is None else max(1, self.steps - steps)
        later = None if minutes is None or self.minutes is None else self.minutes - minutes
        return Budget(steps, minutes), Budget(rest, later)

    def progress(self, step: int, elapsed_s: float) -> float:
        """Return how much of the budget is used, 0 to 1 and above."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = elapsed_s / (60.0 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_time)


T = TypeVar("T")


class Prefetch(Dataset, Generic[T]):
    """The data of a step, `make(step)`, made ahead in worker processes when a GPU waits for them.

    A CPU has nothing to gain: there the step makes its own. Arrays come as tensors either way.
    """

    def __init__(self, make: Callable[[int], T], device: str) -> None:
        self._make = make
        self._workers = len(os.sched_getaffinity(0)) if device.startswith("cuda") else 0
        self._coming: Iterator[T] | None = None
        self._next = -1

    def __getitem__(self, step: int) -> T:
        torch.set_num_threads(1)  # the workers are as many as the cores
        return self._make(step)

    def __call__(self, step: int) -> T:
        """Return the data of `step`; quick when steps come in order."""
        if not self._workers:
            return self._make(step)
        if self._coming is None or step != self._next:
            steps = range(step, 1 << 40)
            self._coming = iter(
                DataLoader(self, sampler=steps, batch_size=None, num_workers=self._workers)
            )
        self._next = step + 1
        return next(self._coming)


def fit(
    name: str,
    model: nn.Module,
    loss_fn: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    lr: float,
    budget: Budget,
    work: Path,
    device: str,
    ema: float | None = None,
    warmup: int = 200,
    weight_decay: float = 0.01,
    hidden: Sequence[Tensor] = (),
    beside: Sequence[nn.Module | torch.optim.Optimizer] = (),
    on_checkpoint: Callable[[nn.Module], None] | None = None,
    about: Mapping[str, int | str] = MappingProxyType({}),
) -> nn.Module:
    """Train `model` with AdamW, warm-up and cosine decay, and return it (its average if `ema`).

    Muon takes the place of AdamW for the weights in `hidden`, if any.

    `loss_fn(step)` draws its data from a generator seeded by the step, so that a resumed run sees
    what an uninterrupted one would have seen. State lives in `work/<name>.pt`, replaced atomically,
    and what it shows is drawn over the steps in `work/<name>-losses.png`.
    What `loss_fn` itself trains `beside` the model is kept and resumed with it.
    `on_checkpoint` gets the model whose weights would be shipped at that moment. `about` is what
    else decides the outcome, such as the seed: a state with another raises ConfigError.
    """
    work.mkdir(parents=True, exist_ok=True)
    model.to(device).train()
    by_muon = {id(weight) for weight in hidden}
    others = [weight for weight in model.parameters() if id(weight) not in by_muon]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay)
    ]
    if hidden:
        optimizers.append(KernelMuon(hidden, lr=lr, weight_decay=weight_decay))
    average = _Average(model, ema) if ema else None
    state = _State(work / f"{name}.pt", model, optimizers, beside, average, dict(about))
    state.resume(device)
    recent: list[dict[str, float]] = []

    def checkpoint() -> None:
        state.keep()
        if state.shown_at:
            draw_losses(state.shown_at, state.history, work / f"{name}-losses.png")
        if on_checkpoint:
            with _shipped(model, average) as ready:
                on_checkpoint(ready)

    last = time.monotonic()
    began = last - state.elapsed_s
    with tqdm(total=100.0, desc=name, mininterval=2.0, bar_format=BAR) as bar:
        while (progress := budget.progress(state.step, state.elapsed_s)) < 1.0:
            warm = min(1.0, (state.step + 1) / warmup)
            rate = lr * warm * 0.5 * (1.0 + math.cos(math.pi * progress))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = max(rate, lr * 0.01)
            loss, shown = loss_fn(state.step)
            model.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            state.step += 1
            if average:
                average.update(model, state.step)
            now = time.monotonic()
            state.elapsed_s = now - began
            bar.update(100.0 * min(1.0, budget.progress(state.step, state.elapsed_s)) - bar.n)
            recent.append(shown)
            if state.step % SHOWN_EVERY == 0:
                means = {k: sum(one[k] for one in recent) / len(recent) for k in shown}
                bar.set_postfix({"step": state.step, **{k: f"{v:.4g}" for k, v in means.items()}})
                state.show(means)
                recent.clear()
            if now - last > CHECKPOINT_EVERY_S:
                checkpoint()
                last = time.monotonic()
    checkpoint()
    if average:
        average.copy_to(model)
    return model.eval()


@dataclass(slots=True)
class _State:
    """Where a training stands, and the file that it goes on from after a kill."""

    file: Path
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    beside: Sequence[nn.Module | torch.optim.Optimizer]
    average: _Average | None
    about: Mapping[str, int | str]
    step: int = 0
    elapsed_s: float = 0.0
    shown_at: list[int] = field(default_factory=list)
    history: dict[str, list[float]] = field(default_factory=dict)

    def show(self, values: Mapping[str, float]) -> None:
        """Take values of this step into the history."""
        self.shown_at.append(self.step)
        for key, value in values.items():
            self.history.setdefault(key, []).append(value)

    def keep(self) -> None:
        """Replace the file by all that there is, at once."""
        content = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "shown_at": self.shown_at,
            "history": self.history,
            "beside": [other.state_dict() for other in self.beside],
            "average": self.average.weights if self.average else None,
            "about": self.about,
        }
        partial = self.file.with_name(f"{self.file.name}.partial")
        torch.save(content, partial)
        os.replace(partial, self.file)

    def resume(self, device: str) -> None:
        """Go on from the file, if there is one.

        Raises DataError for a damaged one, ConfigError for one of another training.
        """
        if not self.file.exists():
            return
        try:
            content = torch.load(self.file, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as err:
            raise DataError(
                f"the state of training in {self.file} is damaged; remove it to begin anew"
            ) from err
        if content.get("about", self.about) != self.about:
            raise ConfigError(
                f"{self.file} holds a training with {_told(content['about'])}, not with "
                f"{_told(self.about)}; remove it, or name another folder with --work"
            )
        self.model.load_state_dict(content["model"])
        for optimizer, kept in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.elapsed_s = content["step"], content["elapsed_s"]
        self.shown_at, self.history = content["shown_at"], content["history"]
        for other, kept in zip(self.beside, content.get("beside", ()), strict=True):
            other.load_state_dict(kept)
        if self.average:
            self.average.load(content["average"])


def _told(about: Mapping[str, int | str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items()) or "none"


def draw_losses(steps: Sequence[int], history: dict[str, list[float]], file: Path) -> None:
    """Draw every value that training shows over its steps, a panel each, as one PNG."""
    figure = Figure(figsize=(4.0 * len(history), 3.2), layout="constrained")
    for axes, (name, values) in zip(
        figure.subplots(1, len(history), squeeze=False)[0], history.items(), strict=True
    ):
        axes.plot(steps, values, linewidth=1.2)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    partial = file.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, file)


class KernelMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) for matrices and for convolution kernels, taken as matrices.

    Updates have the size of AdamW's (Liu et al. 2025, section 2.2), so that both share a rate.
    """

    def __init__(self, weights: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        self.weights = weights
        matrices = [nn.Parameter(_matrix(weight.data)) for weight in weights]
        for matrix, weight in zip(matrices, weights, strict=True):
            if matrix.data_ptr() != weight.data_ptr():
                raise ValueError(f"no matrix views a weight of strides {weight.stride()}")
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        """Move every weight by its own gradient."""
        matrices = self.param_groups[0]["params"]
        for matrix, weight in zip(matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else _matrix(weight.grad).contiguous()
        return super().step(closure)


def _matrix(weight: Tensor) -> Tensor:
    """Return (out, in) as it is and (out, in, h, w) as (out, h * w * in): a view if channels last.

    Muon makes updates orthogonal, in which the order of columns plays no part.
    """
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


class _Average:
    """Exponential moving average of the weights, with a short memory at the start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        # An average of what stays the same could still turn -0 into 0.
        self.still = {name for name, w in model.named_parameters() if not w.requires_grad}
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        state = {k: v for k, v in model.state_dict().items() if k not in self.still}
        floats = [key for key, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[key] for key in floats], [state[key] for key in floats], 1.0 - decay
        )
        for key in state.keys() - floats:
            self.weights[key].copy_(state[key])

    def copy_to(self, model: nn.Module) -> None:
        model.load_state_dict(self.weights)


@contextmanager
def _shipped(model: nn.Module, average: _Average | None) -> Iterator[nn.Module]:
    """Put the averaged weights into the model for a moment, in evaluation mode."""
    kept = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if average:
        average.copy_to(model)
    try:
        yield model.eval()
    finally:
        model.load_state_dict(kept)
        model.train()
