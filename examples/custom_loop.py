"""A custom training loop on plain PyTorch: the whole training state in one file.

    python examples/custom_loop.py runs/state.safetensors

Without Trainer and Accelerate: after each epoch, the model, the optimizer, early stopping and the RNG states are
written to one file, atomically. Kill it and run it again: it resumes with the next epoch, and prints the same last
line.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from hf_lifecycle import EarlyStopping, TrainingStateManager

EPOCHS = 12


def main(file: str) -> str:
    """Train or resume; return the last step, and a digest of the weights."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = slice(0, 1500), slice(1500, None)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(32, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    stopping = EarlyStopping(patience=2, min_delta=0.01)
    parts = {"model": model, "optimizer": optimizer, "stopping": stopping}

    manager, first, step = TrainingStateManager(), 0, 0
    if Path(file).exists():
        state = manager.load_state(file)  # also restores the RNG states of Python, NumPy and torch
        first, step = state["epoch"] + 1, state["step"]
        for name, part in parts.items():
            part.load_state_dict(state["custom_state"][name])

    for epoch in range(first, EPOCHS):
        if stopping.should_stop:
            break
        model.train()
        for rows in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            cross_entropy(model(pixels[train][rows]), labels[train][rows]).backward()
            optimizer.step()
            step += 1
        model.eval()
        with torch.no_grad():
            loss = cross_entropy(model(pixels[test]), labels[test]).item()
        stopping.step(loss)
        print(f"epoch {epoch}: loss {loss:.3f}")
        manager.save_state(
            file,
            epoch,
            step,
            best_metric=stopping.best_metric,
            custom_state={n: part.state_dict() for n, part in parts.items()},
        )

    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return f"step {step}: weights {zlib.crc32(weights.numpy().tobytes()):08x}"


if __name__ == "__main__":
    print(main(sys.argv[1]))
