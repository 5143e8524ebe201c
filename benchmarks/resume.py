"""How long a resume late in a large epoch takes, beside a fresh start: from ``train()`` to the first step.

The data are 10 million map-style samples in batches of 8, shuffled; the break is after 99 % of an epoch. No one trains
for that long here: a checkpoint of step 2 is given that step's number and position, and nothing else of it changes.
Fresh starts and resumes are taken in turns, in one process; the medians count.

Python collects no garbage by itself meanwhile, as ``timeit`` has it: the order of an epoch is one list, and going
through its millions of numbers falls now before the first step, now after it. ``--collect`` lets it.

Run: ``python benchmarks/resume.py [--rounds N] [--samples N] [--collect]`` (prints a line of benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.rank_file import TRAINER, rank_file
from hf_lifecycle.checkpoint.statefile import read_tree, write_tree

BATCH = 8


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


class FirstStep(TrainerCallback):
    """Notes when it begins, and ends training a few steps later."""

    def __init__(self, steps: int) -> None:
        self.steps, self.first = steps, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first = self.first or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps -= 1
        control.should_training_stop = self.steps == 0


def start(folder: Path, samples: int, *, steps: int, resume: Path | None = None) -> float:
    """Seconds from ``train()`` to the first step."""
    first = FirstStep(steps)
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
    callbacks = [first, LifecycleCallback(strict=False)]
    trainer = Trainer(model=Small(), args=args, train_dataset=Many(samples), callbacks=callbacks)
    began = time.perf_counter()
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
    state["stateful_callbacks"]["hf_lifecycle"]["attributes"]["step"] = step
    (late / "trainer_state.json").write_text(json.dumps(state))
    file = rank_file(late, 0)
    tree = read_tree(file, kind=TRAINER)
    tree["identity"]["step"] = step
    tree["parts"]["position"] |= {"epoch": 0, "batches": step, "closed": False, "stopped": False}
    write_tree(file, tree, kind=TRAINER)
    return late


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--collect", action="store_true", help="let Python collect garbage while it is measured")
    arguments = parser.parse_args()
    if not arguments.collect:
        gc.disable()
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
