"""Trainer on several processes that can be interrupted: each ends with the bits of an uninterrupted run.

Classifies the handwritten digits that come with scikit-learn, with random shifts of each image. Every rank prints a
digest of its weights at the end. ``examples/trainer_ddp.sh`` launches it on 2 processes.
"""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_lifecycle import LifecycleCallback, latest_checkpoint


class Net(nn.Module):
    """A small classifier with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def shifted(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of images, each moved by up to one pixel."""
    images = [torch.roll(row["images"], tuple(torch.randint(-1, 2, (2,)).tolist()), dims=(0, 1)) for row in rows]
    return {"images": torch.stack(images), "labels": torch.stack([row["labels"] for row in rows])}


def main() -> None:
    """Train or resume."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="runs/digits-ddp")
    parser.add_argument("--max-steps", type=int, default=60)
    options = parser.parse_args()

    set_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    rows: list[dict[str, Any]] = [{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    args = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=16,
        dataloader_num_workers=1,
        save_steps=20,
        logging_steps=20,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=Net(), args=args, data_collator=shifted, train_dataset=rows, callbacks=[LifecycleCallback()]
    )
    trainer.train(resume_from_checkpoint=latest_checkpoint(options.output_dir))
    digest = hashlib.sha256()
    for tensor in trainer.model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    print(
        f"rank {args.process_index} of {args.world_size}: step {trainer.state.global_step}, {digest.hexdigest()[:16]}"
    )


if __name__ == "__main__":
    main()
