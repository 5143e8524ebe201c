"""A custom training loop on Accelerate that can be interrupted and resumed, on one process or many.

Classifies the handwritten digits that come with scikit-learn, with random shifts of each image. Kill it anywhere and
start it again: it ends with the bits of an uninterrupted run, and prints a digest of them.

    python examples/accelerate_loop.py --output-dir runs/digits
    accelerate launch --num_processes 2 examples/accelerate_loop.py --output-dir runs/digits
"""

from __future__ import annotations

import argparse
import hashlib

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_lifecycle import EarlyStopping, TrainingStateManager


def shifted(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of images, each moved by up to one pixel."""
    images = [torch.roll(image, tuple(torch.randint(-1, 2, (2,)).tolist()), dims=(0, 1)) for image, _ in rows]
    return torch.stack(images), torch.stack([label for _, label in rows])


def main() -> None:
    """Train or resume."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="runs/digits")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--save-every", type=int, default=20)
    options = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator(cpu=True)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16.0
    labels = torch.tensor(digits.target)
    train, held_out = TensorDataset(images[:1500], labels[:1500]), (images[1500:], labels[1500:])

    early = EarlyStopping(patience=3, mode="max")
    manager = TrainingStateManager(accelerator, options.output_dir, objects={"early_stopping": early}, keep_last=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(train, batch_size=32, shuffle=True, collate_fn=shifted)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    resumed = manager.resume()
    accelerator.print(f"resumed from {resumed}" if resumed else "started")
    for epoch in manager.epochs(options.epochs):
        model.train()
        for pictures, numbers in manager.batches(loader):
            accelerator.backward(nn.functional.cross_entropy(model(pictures), numbers))
            optimizer.step()
            optimizer.zero_grad()
            if manager.progress.step % options.save_every == 0:
                manager.save(wait=False)  # written in the background
        with manager.evaluating(), torch.no_grad():
            model.eval()
            right = (model(held_out[0]).argmax(dim=1) == held_out[1]).float().mean().item()
        accelerator.print(f"epoch {epoch}: {right:.1%} of the digits right")
        if early.step(right):
            break
    weights = b"".join(value.numpy().tobytes() for value in accelerator.unwrap_model(model).state_dict().values())
    accelerator.print(f"step {manager.progress.step}, weights {hashlib.sha256(weights).hexdigest()[:16]}")


if __name__ == "__main__":
    main()
