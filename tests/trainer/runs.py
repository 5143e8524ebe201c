"""Tiny trainings for the tests of this folder: made afresh, broken off at will, and compared bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.directory.manifest import FileEntry, files_below, manifest_path, read_manifest
from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
from hf_lifecycle.checkpoint.files.regular import digest_file
from hf_lifecycle.checkpoint.files.statefile import read_tree, write_tree
from hf_lifecycle.state.fingerprint import leaf_digests, module_tensors, tensor_digest

__all__ = [
    "BrokenOff",
    "Ends",
    "Labelled",
    "Net",
    "Rows",
    "Stream",
    "break_off",
    "changed_state",
    "digests",
    "flip",
    "images",
    "mix_generators",
    "new_trainer",
    "require_same_end",
    "reseal",
    "saved_run",
    "tiny_vit",
]


class BrokenOff(BaseException):
    """Training was broken off; no one may catch it and go on."""


class Ends(TrainerCallback):
    """Breaks training off at a step's end."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise BrokenOff


class Net(nn.Module):
    """Two layers with dropout and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x).squeeze(-1)
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


class Rows(Dataset):
    """Rows with a target."""

    def __init__(self, rows: int = 16, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, 4, generator=generator)
        self.labels = self.x.sum(dim=1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


class Labelled(Rows):
    """Rows in an order and with labels of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.order = list(range(len(self)))
        self.values = [0.0] * len(self)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(self.order[index]) | {"labels": torch.tensor(self.values[index])}


class Stream(IterableDataset):
    """The same rows as a stream without a length."""

    def __init__(self, rows: int = 16) -> None:
        self.rows = Rows(rows)

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self.rows[index] for index in range(first, len(self.rows), step))


class _Breaker(TrainerCallback):
    def __init__(self, event: str, step: int) -> None:
        self._step = step
        setattr(self, event, self._meet)

    def _meet(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self._step:
            raise BrokenOff


def reseal(checkpoint: Path) -> None:
    """Let the manifest vouch for the files as they are now, so that what lies behind it is what finds a change."""
    manifest = read_manifest(checkpoint)
    files = tuple(
        FileEntry(path.relative_to(checkpoint).as_posix(), path.stat().st_size, digest_file(path))
        for path in files_below(checkpoint)
    )
    manifest_path(checkpoint).write_bytes(replace(manifest, files=files).to_json())


def flip(file: Path, at: int | None = None) -> None:
    """Flip one bit of a file: of the byte in its middle, or of another."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    file.write_bytes(content)


@contextmanager
def changed_state(checkpoint: Path, kind: str = TRAINER) -> Iterator[dict[str, Any]]:
    """What rank 0 has added to a checkpoint, as the block changes it; the manifest vouches for it then."""
    tree = read_tree(rank_file(checkpoint, 0), kind=kind)
    yield tree
    write_tree(rank_file(checkpoint, 0), tree, kind=kind)
    reseal(checkpoint)


def mix_generators() -> None:
    """What a new process would not know: where the global generators were."""
    seed = random.SystemRandom().getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def new_trainer(
    output_dir: Path,
    *callbacks: TrainerCallback,
    model: nn.Module | None = None,
    train: Any = None,
    evaluated: Any = None,
    kind: type[Trainer] = Trainer,
    with_trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of 6 steps, 4 to an epoch, that saves and logs every 2; ``settings`` are training arguments."""
    mix_generators()
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 2,
    }
    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = Net()
    return kind(
        model=model,
        args=TrainingArguments(output_dir=str(output_dir), **{**defaults, **settings}),
        train_dataset=train if train is not None else Rows(),
        eval_dataset=evaluated if evaluated is not None else Rows(6, seed=2),
        callbacks=list(callbacks),
        **(with_trainer or {}),
    )


def break_off(trainer: Trainer, *, at: str = "on_step_begin", step: int = 4, resume: Any = None) -> Trainer:
    """Train until ``at`` is raised at ``step``, and no further."""
    breaker = _Breaker(at, step)
    trainer.add_callback(breaker)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except BrokenOff:
        trainer.remove_callback(breaker)
        return trainer
    raise AssertionError(f"{at} at step {step} never came")


def require_same_end(make: Callable[[str], Trainer], *, step: int = 4) -> tuple[Trainer, Trainer]:
    """Hold a run that is broken off before ``step`` and resumed to the unbroken one.

    Args:
        make: Makes the trainer that saves into the folder of this name.
        step: Where the run is broken off.

    Returns:
        The trainers of the resumed run and of the unbroken one.
    """
    unbroken = make("unbroken")
    unbroken.train()
    broken = break_off(make("broken"), step=step)
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=True)
    assert broken is not resumed  # which lives, so that nothing of the resumed run has the addresses of before
    assert digests(resumed) == digests(unbroken)
    return resumed, unbroken


def saved_run(output_dir: Path, *, callback: TrainerCallback | None = None, step: int = 4, **settings: Any) -> Path:
    """A run with the callback, broken off at ``step``; returns its last checkpoint."""
    break_off(new_trainer(output_dir, callback or LifecycleCallback(), **settings), step=step)
    return output_dir / f"checkpoint-{step}"


def digests(trainer: Trainer) -> dict[str, str]:
    """Every model tensor and optimizer value, by name."""
    found = {name: tensor_digest(tensor) for name, tensor in module_tensors(trainer.model).items()}
    return found | leaf_digests(trainer.optimizer.state_dict(), "optimizer")


def tiny_vit() -> Any:
    """An architecture of which Trainer's own resume loses weights."""
    from transformers import ViTConfig, ViTForImageClassification

    shape: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return ViTForImageClassification(
            ViTConfig(image_size=4, patch_size=2, num_channels=1, intermediate_size=8, **shape)
        )


def images(rows: int = 16) -> Dataset:
    """Noise with one of two labels."""
    pixels = torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    class Images(Dataset):
        def __len__(self) -> int:
            return rows

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"pixel_values": pixels[index], "labels": index % 2}

    return Images()
