"""Early stopping that survives a resume: handwritten digits, until the accuracy no longer rises.

    python examples/early_stopping.py runs/stopping

Kill it between two evaluations and run it again: the patience counter continues, the run stops at the same step, and
the model ends with the best weights, not the last ones.
"""

from __future__ import annotations

import sys
import zlib
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from hf_lifecycle import EarlyStopping, LifecycleCallback, latest_checkpoint


class Classifier(torch.nn.Module):
    """8 x 8 pixels to one of ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(32, 10)
        )

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(pixels)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The fraction of digits that were classified correctly."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(output_dir: str) -> tuple[Trainer, EarlyStopping]:
    """Create everything."""
    set_seed(0)
    digits = load_digits()
    rows: list[dict[str, Any]] = [
        {"pixels": torch.tensor(pixels, dtype=torch.float32) / 16, "labels": int(label)}
        for pixels, label in zip(digits.data, digits.target, strict=True)
    ]
    stopping = EarlyStopping(patience=3, min_delta=0.005, mode="max", restore_best=True)
    settings: dict[str, Any] = {"num_train_epochs": 20, "per_device_train_batch_size": 64, "learning_rate": 5e-3}
    settings |= {"eval_strategy": "steps", "eval_steps": 20, "save_steps": 20, "per_device_eval_batch_size": 256}
    trainer = Trainer(
        model=Classifier(),
        args=TrainingArguments(output_dir=output_dir, **settings, disable_tqdm=True, report_to="none"),
        train_dataset=rows[:1500],
        eval_dataset=rows[1500:],
        compute_metrics=accuracy,
        callbacks=[LifecycleCallback(early_stopping=stopping, monitor="accuracy")],
    )
    return trainer, stopping


def main(output_dir: str) -> str:
    """Train or resume; return why it stopped, and a digest of the weights."""
    trainer, stopping = make_trainer(output_dir)
    trainer.train(resume_from_checkpoint=latest_checkpoint(output_dir))
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    digest = zlib.crc32(weights.numpy().tobytes())
    return f"step {trainer.state.global_step}: {stopping.reason}; weights {digest:08x}"


if __name__ == "__main__":
    print(main(sys.argv[1]))
