"""How long a resume late in a large epoch takes, beside a fresh start: from ``train()`` to the first step.

The data are 10 million map-style samples in batches of 8, shuffled; the break is after 99 % of an epoch. No one trains
for that long here: a checkpoint of step 2 is given that step's number and position, and nothing else of it changes.
Fresh starts and resumes are taken in turns, in one process; the medians count. ``--first-step`` holds fresh starts
beside stock Trainer's instead: the first one of a process (cold) and those after it (warm), in processes of their own,
in turns. ``--load GB`` holds resumes from a large checkpoint beside stock's, each in a process of its own, in turns:
with its files in the system's memory (warm), and without (cold). Its clock begins before the trainer is made, which is
when the callback verifies the newest checkpoint of its directory.

Python collects no garbage by itself meanwhile, as ``timeit`` has it: the order of an epoch is one list, and going
through its millions of numbers falls now before the first step, now after it. ``--collect`` lets it.

Run: ``python benchmarks/resume.py [--rounds N] [--samples N] [--collect] [--first-step] [--load GB]``
(prints a line of benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from stall import shape
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.files.additions import TRAINER, mark_in, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree, write_tree

BATCH = 8
_STARTS = 4  # in one process


class Many(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Samples that cost nothing."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([float(index % 7)]), "labels": torch.tensor([1.0])}


class Small(torch.nn.Module):
    """A model that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(x)
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


class Text(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Tokens for a language model."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(32) + index
        return {"input_ids": tokens, "labels": tokens}


class FirstStep(TrainerCallback):
    """Notes when it begins, and ends training after the step ``last``."""

    def __init__(self, last: int) -> None:
        self.last, self.first = last, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first = self.first or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.last


def start(
    folder: Path, samples: int, *, steps: int, resume: Path | None = None, stock: bool = False, size: float = 0
) -> float:
    """Seconds from ``train()`` to the first step; with a ``size``, from before the trainer is made.

    Args:
        stock: Whether the callback is left out.
        size: Gigabytes of a language model with its optimizer; 0 for a model and samples that cost nothing.
    """
    first = FirstStep(steps if resume is None else int(resume.name.rpartition("-")[2]) + steps)
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        save_steps=2,
        logging_strategy="no",
    )
    # Ended in mid-epoch, it is not the run that it would have been; nobody looks at it.
    callbacks = [first] if stock else [first, LifecycleCallback(strict=False)]
    model = GPT2LMHeadModel(GPT2Config(**shape(size), use_cache=False)) if size else Small()
    began = time.perf_counter()
    trainer = Trainer(model=model, args=args, train_dataset=Text() if size else Many(samples), callbacks=callbacks)
    began = began if size else time.perf_counter()
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return first.first - began


def late_checkpoint(folder: Path, samples: int) -> Path:
    """A checkpoint after 99 % of an epoch."""
    start(folder, samples, steps=2)
    early, step = folder / "checkpoint-2", samples // BATCH * 99 // 100
    late = folder / f"checkpoint-{step}"
    early.rename(late)
    (late / "lifecycle" / "manifest.json").unlink()
    state = json.loads((late / "trainer_state.json").read_text())
    state |= {"global_step": step, "epoch": step * BATCH / samples}
    mark_in(state["stateful_callbacks"])["step"] = step
    (late / "trainer_state.json").write_text(json.dumps(state))
    file = rank_file(late, 0)
    tree = read_tree(file, kind=TRAINER)
    tree["identity"]["step"] = step
    tree["parts"]["position"] |= {"epoch": 0, "batches": step, "closed": False, "stopped": False}
    write_tree(file, tree, kind=TRAINER)
    return late


def first_steps(samples: int, rounds: int) -> str:
    """Fresh starts beside stock Trainer's, each kind in processes of its own."""
    found: dict[str, list[list[float]]] = {"stock": [], "callback": []}
    for number in range(2 * rounds):
        kind = "stock" if number % 4 in (0, 3) else "callback"
        command = [sys.executable, __file__, "--one", kind, "--samples", str(samples)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    told = []
    for when, some in (("cold", slice(0, 1)), ("warm", slice(1, None))):
        stock, ours = (statistics.median(one for run in found[kind] for one in run[some]) for kind in found)
        told.append(f"{when}: stock {stock:.2f} s, callback {ours:.2f} s ({ours / stock:.2f} of it)")
    return f"{samples:,} samples, to the first step, {'; '.join(told)}"


def loads(size: float, rounds: int) -> str:
    """Resumes from a large checkpoint beside stock Trainer's, each from its own checkpoint."""
    found: dict[str, dict[str, list[float]]] = {when: {"stock": [], "callback": []} for when in ("cold", "warm")}
    with tempfile.TemporaryDirectory() as place:

        def run(kind: str, *more: str) -> float:
            command = [sys.executable, __file__, "--load", str(size), "--one", kind, "--place", place, *more]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            return float(done.stdout.splitlines()[-1])

        for kind in ("stock", "callback"):
            run(kind, "--save")
        for number in range(2 * rounds):
            kind = "stock" if number % 4 in (0, 3) else "callback"
            for when in found:
                for file in (Path(place) / kind / "checkpoint-2").rglob("*"):
                    if file.is_file():
                        _put_into_memory(file, is_wanted=when == "warm")
                found[when][kind].append(run(kind))
    told = []
    for when, each in found.items():
        stock, ours = statistics.median(each["stock"]), statistics.median(each["callback"])
        told.append(f"{when}: stock {stock:.2f} s, callback {ours:.2f} s ({ours / stock:.2f} of it)")
    return f"resume from {size:g} GB, {'; '.join(told)}"


def _put_into_memory(file: Path, *, is_wanted: bool) -> None:
    """Let the system keep a file's pages, or give them up."""
    with file.open("rb") as opened:
        if is_wanted:
            while opened.read(1 << 24):
                pass
        else:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--collect", action="store_true", help="let Python collect garbage while it is measured")
    parser.add_argument("--first-step", action="store_true", help="fresh starts beside stock Trainer's")
    parser.add_argument("--load", type=float, default=0, help="resumes from a checkpoint of so many GB beside stock's")
    parser.add_argument("--one", choices=("stock", "callback"), help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.collect:
        gc.disable()
    if arguments.one and arguments.load:
        folder, stock = arguments.place / arguments.one, arguments.one == "stock"
        resume, steps = (None, 2) if arguments.save else (folder / "checkpoint-2", 1)
        print(start(folder, 0, steps=steps, resume=resume, stock=stock, size=arguments.load))
        return
    if arguments.load:
        print(loads(arguments.load, arguments.rounds))
        return
    if arguments.one:
        with tempfile.TemporaryDirectory() as place:
            starts = [(Path(place) / str(number), arguments.one == "stock") for number in range(_STARTS)]
            print(json.dumps([start(at, arguments.samples, steps=1, stock=stock) for at, stock in starts]))
        return
    if arguments.first_step:
        print(first_steps(arguments.samples, arguments.rounds))
        return
    fresh, resumed = [], []
    with tempfile.TemporaryDirectory() as place:
        late = late_checkpoint(Path(place) / "run", arguments.samples)
        for number in range(2 * arguments.rounds):
            if number % 4 in (0, 3):  # now this one first, now the other
                fresh.append(start(Path(place) / f"fresh-{number}", arguments.samples, steps=1))
                continue
            copy = Path(place) / f"resumed-{number}" / late.name
            shutil.copytree(late, copy)
            resumed.append(start(copy.parent, arguments.samples, steps=1, resume=copy))
    ratio = statistics.median(resumed) / statistics.median(fresh)
    print(
        f"{arguments.samples:,} samples: fresh {statistics.median(fresh):.2f} s, resumed after 99 % of the epoch "
        f"{statistics.median(resumed):.2f} s ({ratio:.2f} of it)"
    )


if __name__ == "__main__":
    main()
