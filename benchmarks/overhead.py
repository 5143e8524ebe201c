"""What LifecycleCallback adds to a step without a save and to a batch, and what ``manager.batches`` does in a loop.

Both are measured in one process and in turns, since machines are shared and their speed drifts: for each round, one
run without the callback and one with it, and the difference of the medians over all rounds. The clock is the CPU time
of the training thread, which other processes disturb less than wall time; nothing that is measured waits. The model is
a single linear layer, so that the callback is not drowned in arithmetic.

Run: ``python benchmarks/overhead.py [--rounds N] [--steps N]`` (prints the table of benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_lifecycle import LifecycleCallback, TrainingStateManager

BATCH = 8


def sample(index: int) -> dict[str, torch.Tensor]:
    """One item that draws from all three host generators."""
    x = torch.rand(16) * random.random() + float(np.random.random_sample()) + index
    return {"x": x, "labels": x.sum()}


class MapStyle(Dataset[Any]):
    """Augmented samples by index."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return sample(index)


class Stream(IterableDataset[Any]):
    """Augmented samples in order."""

    def __iter__(self) -> Any:
        return (sample(index) for index in range(1_000_000))


class StreamWithState(Stream):
    """The same with a state, which is kept with every batch; what it draws is watched for as well."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Any:
        for index in range(self.given, 1_000_000):
            self.given = index + 1
            x = torch.full((16,), float(index))
            yield {"x": x, "labels": x.sum()}

    def state_dict(self) -> dict[str, int]:
        """How many rows were given."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin after them."""
        self.given = state["given"]


class Linear(torch.nn.Module):
    """The smallest model that Trainer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.layer(x).squeeze(-1) - labels) ** 2).mean()}


class Clock(TrainerCallback):
    """The CPU time from each step's end to the next: a step and the batches that it needs."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        self.ends.append(time.thread_time())

    def microseconds(self) -> list[float]:
        """Every step but the first five, which pay for what is made once."""
        return [(b - a) * 1e6 for a, b in zip(self.ends[5:], self.ends[6:], strict=False)]


def run(dataset: Any, steps: int, accumulation: int, *, with_callback: bool) -> list[float]:
    """Train ``steps`` optimizer steps; the time of each, in microseconds."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        callbacks: list[TrainerCallback] = [LifecycleCallback()] if with_callback else []
        trainer = Trainer(model=Linear(), args=args, train_dataset=dataset, callbacks=[*callbacks, clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.microseconds()


def measure(dataset: Any, steps: int, rounds: int, accumulation: int) -> tuple[float, float]:
    """Medians in microseconds a step: without and with the callback."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        for with_callback in (False, True) if number % 2 else (True, False):
            times[with_callback] += run(dataset, steps, accumulation, with_callback=with_callback)
    return statistics.median(times[False]), statistics.median(times[True])


def run_loop(dataset: Any, batches: int, *, with_manager: bool) -> list[float]:
    """Go through ``batches`` of a loop on accelerate, training left out; the time of each, in microseconds."""
    for singleton in (AcceleratorState, GradientState, PartialState):
        singleton._reset_state()
    accelerator = Accelerator(cpu=True)
    manager = TrainingStateManager(accelerator) if with_manager else None
    loader = accelerator.prepare(DataLoader(dataset, batch_size=BATCH))
    times, before = [], time.thread_time()
    for batch in loader if manager is None else manager.batches(loader):
        assert len(batch) == 2
        now = time.thread_time()
        times.append((now - before) * 1e6)
        before = now
        if len(times) == batches:
            break
    if manager is not None:
        manager.close()
    return times[5:]


def measure_loop(dataset: Any, batches: int, rounds: int) -> tuple[float, float]:
    """Medians in microseconds a batch: of the loader alone and through the manager."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        for with_manager in (False, True) if number % 2 else (True, False):
            times[with_manager] += run_loop(dataset, batches, with_manager=with_manager)
    return statistics.median(times[False]), statistics.median(times[True])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    print(f"| data (batches of {BATCH}) | without | with | added a step | added a batch |")
    print("|---|---|---|---|---|")
    for name, dataset in (("map-style", MapStyle()), ("stream", Stream()), ("stream with state", StreamWithState())):
        one, four = (measure(dataset, options.steps // a, options.rounds, a) for a in (1, 4))
        # added(1) = step + batch, added(4) = step + 4 batches
        batch = ((four[1] - four[0]) - (one[1] - one[0])) / 3
        step = (one[1] - one[0]) - batch
        print(f"| {name} | {one[0]:.0f} µs | {one[1]:.0f} µs | {step:.0f} µs | {batch:.0f} µs |", flush=True)
    print(f"\n| data (batches of {BATCH}) | loader | manager.batches(loader) | added a batch |")
    print("|---|---|---|---|")
    for name, dataset in (("map-style", MapStyle()), ("stream", Stream())):
        alone, through = measure_loop(dataset, options.steps, options.rounds)
        print(f"| {name} | {alone:.0f} µs | {through:.0f} µs | {through - alone:.0f} µs |", flush=True)


if __name__ == "__main__":
    main()
