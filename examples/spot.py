"""Training on a machine that may disappear at any moment: digits, a small network, Trainer.

    python examples/spot.py --output-dir runs/digits

Send it SIGTERM, or press Ctrl-C, or let its job come near its end: it saves the current step and ends. Run the same
command: it resumes, and ends with the bits of an uninterrupted run. The last line prints a digest of the weights.
"""

from __future__ import annotations

import argparse
import zlib

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments, set_seed

from hf_lifecycle import LifecycleCallback, latest_checkpoint


class Classifier(torch.nn.Module):
    """8 x 8 pixels to one of ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(64, 10)
        )

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(pixels)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch with noisy pixels, so that a resume has to restore more than the order of rows."""
    pixels, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"pixels": pixels + 0.05 * torch.randn_like(pixels), "labels": labels}


def main() -> None:
    """Train or resume."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--epochs", type=float, default=3)
    options = parser.parse_args()
    set_seed(0)
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    trainer = Trainer(
        model=Classifier(),
        args=TrainingArguments(
            output_dir=options.output_dir,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=256,
            learning_rate=1e-3,
            eval_strategy="epoch",
            save_steps=200,  # rarely: a signal triggers its own save
            save_total_limit=2,
            logging_steps=5,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=TensorDataset(pixels[:1500], labels[:1500]),
        eval_dataset=TensorDataset(pixels[1500:], labels[1500:]),
        data_collator=collate,
        callbacks=[LifecycleCallback(signals=("SIGTERM", "SIGINT", "SIGUSR1"), time_limit="auto")],
    )
    trainer.train(resume_from_checkpoint=latest_checkpoint(options.output_dir))
    weights = torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])
    print(f"step {trainer.state.global_step}: weights {zlib.crc32(weights.detach().numpy().tobytes()):08x}")


if __name__ == "__main__":
    main()
