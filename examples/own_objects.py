"""Save and restore the state of your own object with the run: a moving average of the weights.

    python examples/own_objects.py runs/average

Any object with ``state_dict()`` and ``load_state_dict()`` can be passed by name. Kill it and run it again: the average
continues as if nothing had happened. The last line prints a digest of it to compare.
"""

from __future__ import annotations

import sys
import zlib
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_lifecycle import LifecycleCallback, latest_checkpoint


class Average(TrainerCallback):
    """An exponential moving average of a model's weights, updated after every step."""

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_end(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        for name, value in model.state_dict().items():
            self.weights[name] = torch.lerp(value, self.weights.get(name, value), self.decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.weights

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.weights = dict(state)


class Classifier(torch.nn.Module):
    """8 x 8 pixels to one of ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Dropout(0.2), torch.nn.Linear(32, 10))

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.cross_entropy(self.layers(pixels), labels)}


def make_trainer(output_dir: str) -> tuple[Trainer, Average]:
    """Create everything."""
    set_seed(0)
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    rows = [{"pixels": row, "labels": int(label)} for row, label in zip(pixels, digits.target, strict=True)]
    average = Average()
    settings: dict[str, Any] = {"max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 5e-3}
    trainer = Trainer(
        model=Classifier(),
        args=TrainingArguments(output_dir, **settings, save_steps=20, disable_tqdm=True, report_to="none"),
        train_dataset=rows,
        callbacks=[average, LifecycleCallback(objects={"average": average})],  # LifecycleCallback last
    )
    return trainer, average


def main(output_dir: str) -> str:
    """Train or resume; return a digest of the average."""
    trainer, average = make_trainer(output_dir)
    trainer.train(resume_from_checkpoint=latest_checkpoint(output_dir))
    weights = torch.cat([value.flatten() for value in average.weights.values()])
    return f"step {trainer.state.global_step}: average {zlib.crc32(weights.numpy().tobytes()):08x}"


if __name__ == "__main__":
    print(main(sys.argv[1]))
