"""What every stage shares: the optimisers, the schedule, and a loop that can be killed and goes on where it was.

A step draws all its randomness (batch, dropout, negatives) from its own number, so a checkpoint needs the weights, the
optimisers' state and the step alone, and a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

Batch = TypeVar("Batch")
_TABLES = re.compile("embed|head|shared")  # names of embeddings and output layers ("shared" is T5's)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a stage learns. ``warmup`` and ``decay`` are fractions of ``steps``; ``factors`` multiply
    the learning rate of the parameters whose names match a pattern."""

    name: str
    steps: int
    batch: int
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.02
    decay: float = 0.6
    save_every: int = 250
    seed: int = 0
    factors: Mapping[str, float] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """The learning rate's factor: up, flat, then down to 0 along a straight line."""
        done = step / self.steps
        return min(1.0, (step + 1) / (self.warmup * self.steps + 1), (1 - done) / self.decay)

    def factor(self, parameter: str) -> float:
        """The first of ``factors`` whose pattern the parameter's name matches."""
        return next((factor for pattern, factor in self.factors.items() if re.search(pattern, parameter)), 1.0)

    def rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, step))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz, for the matrices of hidden layers (Jordan et al., 2024).

    torch.optim.Muon does the iteration in bfloat16, which is slow on a CPU without it; this one stays in fp32 and
    takes matrices of one shape together.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(param.shape, []).append(param)
            for params in by_shape.values():
                self._step_alike(params, group)

    def _step_alike(self, params: list[nn.Parameter], group: dict[str, float]) -> None:
        updates = []
        for param in params:
            buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
            buffer.lerp_(param.grad, 1 - group["momentum"])
            updates.append(torch.lerp(param.grad, buffer, group["momentum"]))  # Nesterov
        directions = orthogonalise(torch.stack(updates))
        rows, columns = params[0].shape
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        for param, direction in zip(params, directions, strict=True):
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(direction, alpha=-scale)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly the nearest semi-orthogonal matrices: (N, R, C) -> (N, R, C), singular values about 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.transpose(1, 2) if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if matrices.shape[1] > matrices.shape[2] else x


def optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW for embeddings, heads, norms and biases, in groups of one factor each."""
    matrices: dict[float, list[nn.Parameter]] = defaultdict(list)
    others: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        is_matrix = param.ndim == 2 and min(param.shape) >= 64 and not _TABLES.search(name)
        (matrices if is_matrix else others)[recipe.factor(name)].append(param)
    muon = Muon(_groups(matrices), recipe.muon_lr, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(_groups(others), recipe.adam_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    return [muon, adam]


def _groups(params: Mapping[float, list[nn.Parameter]]) -> list[dict[str, Any]]:
    return [{"params": alike, "factor": factor} for factor, alike in params.items()]


class Run:
    """The training of ``model`` by ``recipe``, checkpointed in ``folder``/<name>.pt.

    ``loss`` gives, for a step and its generator, the loss to descend and the figures to log.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        model: nn.Module,
        loss: Callable[[int, np.random.Generator], tuple[torch.Tensor, dict[str, float]]],
    ) -> None:
        self.path = folder / f"{recipe.name}.pt"
        self.log_path = folder / f"{recipe.name}.jsonl"
        self.recipe, self.model, self.loss = recipe, model, loss
        self.optimisers = optimisers(model, recipe)
        self.seconds = 0.0
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)

    def train(self) -> None:
        """Train up to the recipe's last step."""
        self.resume()
        last = self.recipe.steps
        self.model.train()
        with tqdm(total=self.recipe.steps, initial=self.step, desc=self.recipe.name, smoothing=0.05) as bar:
            while self.step < last:
                figures = self._one_step()
                bar.update()
                bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()}, refresh=False)
                if self.step % self.recipe.save_every == 0 or self.step == last:
                    self.save()
        self.model.eval()

    def _one_step(self) -> dict[str, float]:
        started = time.perf_counter()
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step)
        loss, figures = self.loss(self.step, self.recipe.rng(self.step))
        loss.backward()
        rate = self.recipe.rate(self.step)
        for optimiser, base in zip(self.optimisers, (self.recipe.muon_lr, self.recipe.adam_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * rate * group["factor"]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.perf_counter() - started
        figures = {"loss": float(loss.detach()), **figures}
        if self.step % 10 == 0 or self.step == 1:
            with self.log_path.open("a") as log:
                log.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **figures}) + "\n")
        return figures

    def save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad},
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def resume(self) -> None:
        """Load the last checkpoint, if any, and drop log lines that are later than it."""
        if not self.path.exists():
            self.log_path.unlink(missing_ok=True)
            return
        state = torch.load(self.path, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"], strict=False)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        kept = [entry for entry in read_log(self.log_path) if entry["step"] <= self.step]
        self.log_path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))


class Ahead(Generic[Batch]):
    """Prepares the next step's batch in a thread while the present one is being learnt from."""

    def __init__(self, prepare: Callable[[int], Batch]) -> None:
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(1)
        self._pending: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        present = self._pending.pop(step, None) or self._pool.submit(self._prepare, step)
        self._pending = {step + 1: self._pool.submit(self._prepare, step + 1)}
        return present.result()


def is_done(folder: Path, recipe: Recipe) -> bool:
    path = folder / f"{recipe.name}.pt"
    return path.exists() and torch.load(path, weights_only=True)["step"] >= recipe.steps


def read_log(path: Path) -> list[dict[str, float]]:
    """The entries of a log; a last line cut short by a kill is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
