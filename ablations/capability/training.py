"""Train one network on one task, test it, and count it: the columns of a row. Runs in a child process."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ablations.capability.task import IGNORED
from ablations.capability.trial import Trial
from attention_zoo import Attention, load_plugin
from attention_zoo import options as declared
from profiling.cases.workload import AUTOCAST, Workload
from profiling.meters import macs, peak_memory

WEIGHT_DECAY, WARM_UP, CLIP = 0.01, 0.1, 1.0
"""Of AdamW; share of steps in which the learning rate rises; largest norm of the gradient."""
AHEAD = 20
"""Batches generated at once."""
TEST_SEED = 1_000_000
"""The same images for all networks; no training has this seed."""
TEST_IMAGES = 128


@dataclass(frozen=True)
class Job:
    """A trial, and what a fresh process needs to run it."""

    trial: Trial
    plugins: tuple[str, ...] = ()
    threads: int = 1
    test_images: int = TEST_IMAGES

    def load(self) -> None:
        """Import the plugins, and use as many threads as allowed."""
        for plugin in self.plugins:
            load_plugin(plugin)
        torch.set_num_threads(self.threads)


def count(job: Job) -> dict[str, Any]:
    """Parameters, MACs of one image and predicted memory of a training step, without a run."""
    job.load()
    trial = job.trial
    with torch.device("meta"):
        net = trial.network()
        one = Workload(net, torch.empty(trial.shape(1)), "forward", input_gradient=False)
        step = Workload(net, torch.empty(trial.shape(trial.batch)), "forward_backward", input_gradient=False)
    return {
        "params": sum(p.numel() for p in net.parameters()),
        "macs_counted": macs.counted(one)[0],
        "memory_predicted_bytes": peak_memory.predict(step, trial.device).peak if trial.dtype == "fp32" else None,
    }


def train(job: Job) -> dict[str, Any]:
    """Train and test; ``status`` is ``diverged`` if the loss is no number at some step."""
    job.load()
    trial = job.trial
    # What a task reads, it reads once.
    trial.what.batch(TEST_SEED, 1, (trial.grid, trial.grid), trial.difficulty)
    begin = time.process_time()
    torch.manual_seed(trial.seed)
    net = trial.network().to(trial.device)
    net.train()
    optimiser = torch.optim.AdamW(net.parameters(), trial.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, trial.learning_rate, total_steps=trial.number_of_steps, pct_start=WARM_UP
    )
    losses, times, generating = [], [], Clock()
    for images, labels in _batches(trial, generating):
        start = time.perf_counter()
        with _precision(trial):
            loss = functional.cross_entropy(net(images), labels, ignore_index=IGNORED)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
        if not np.isfinite(losses[-1]):
            reason = f"the loss became {losses[-1]} at step {len(losses)} of {trial.number_of_steps}"
            return {"status": "diverged", "reason": reason}
    seconds = time.process_time() - begin
    columns = {
        "impl": _implementation(net, trial),
        "chance": trial.what.chance,
        "loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
        "step_p50_ms": 1000 * statistics.median(times),
        "train_seconds": seconds,
        "data_share": min(1.0, generating.seconds / seconds),
    }
    return columns | _tested(net, trial, job.test_images)


class Clock:
    """Processor time of the blocks that it is entered for."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.process_time()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.process_time() - self._start


def _batches(trial: Trial, clock: Clock) -> Iterator[tuple[Tensor, Tensor]]:
    grid = (trial.grid, trial.grid)
    for begin in range(0, trial.number_of_steps, AHEAD):
        several = min(AHEAD, trial.number_of_steps - begin)
        with clock:
            batch = trial.what.batch((trial.seed, begin), several * trial.batch, grid, trial.difficulty)
            images, labels = (torch.from_numpy(part).to(trial.device) for part in batch)
        yield from zip(images.split(trial.batch), labels.split(trial.batch), strict=True)


def _precision(trial: Trial) -> torch.autocast:
    return torch.autocast(trial.device, AUTOCAST["bf16"], enabled=trial.dtype == "bf16")


def _tested(net: nn.Module, trial: Trial, images: int) -> dict[str, Any]:
    """Accuracies at the grid of training and at twice that; why not, where that fails."""
    accuracy, answers = _accuracy(net, trial, trial.grid, images)
    columns: dict[str, Any] = {"status": "ok", "reason": "", "accuracy": accuracy, "answers": answers}
    others: dict[str, dict[str, Any]] = {"accuracy_double": {}}
    if "n_win" in declared(trial.name):
        others["accuracy_double_auto"] = {"n_win": "auto"}
    for column, changed in others.items():
        try:
            larger = trial.network(**changed).to(trial.device)
            larger.load_state_dict(net.state_dict())
            columns[column], _ = _accuracy(larger, trial, 2 * trial.grid, images)
        except (ValueError, RuntimeError) as problem:
            columns["reason"] = f"{column}: {type(problem).__name__}: {' '.join(str(problem).split())}"[:300]
    return columns


@torch.no_grad()
def _accuracy(net: nn.Module, trial: Trial, side: int, count: int) -> tuple[float, int]:
    """Share of right answers on new images of a grid, and the number of answers."""
    batch = trial.what.batch(TEST_SEED, count, (side, side), trial.difficulty, test=True)
    images, labels = map(torch.from_numpy, batch)
    net.eval()
    right = 0
    for part, answer in zip(images.split(trial.batch), labels.split(trial.batch), strict=True):
        with _precision(trial):
            guess = net(part.to(trial.device)).argmax(1).cpu()
        right += int((guess == answer).sum())
    answers = int((labels != IGNORED).sum())
    return right / answers, answers


def _implementation(net: nn.Module, trial: Trial) -> str:
    x = torch.empty(1, trial.grid, trial.grid, trial.dim, device=trial.device, requires_grad=True)
    result: Sequence[str] = [module.chosen_impl(x) for module in net.modules() if isinstance(module, Attention)]
    return " ".join(sorted(set(result))) or "reference"
