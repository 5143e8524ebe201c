"""Trainer with exact resume: a small language model on the bytes of Python's own standard library.

    python examples/trainer.py runs/bytes

Kill it at any time and run the same command: it resumes from the newest intact checkpoint, and ends with the bits of an
uninterrupted run. The last line prints a digest of the weights to compare.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from hf_lifecycle import LifecycleCallback, latest_checkpoint

LENGTH = 64


def blocks(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The source of a package, cut into blocks of bytes."""
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def make_trainer(output_dir: str) -> Trainer:
    """Create everything; a resumed run uses the same lines."""
    set_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    rows = blocks(Path(json.__file__).parent)
    return Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=30,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            eval_strategy="steps",
            eval_steps=10,
            save_steps=10,
            save_total_limit=2,
            logging_steps=5,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=rows[32:],
        eval_dataset=rows[:32],
        callbacks=[LifecycleCallback()],
    )


def main(output_dir: str) -> str:
    """Train or resume; return a digest of the weights."""
    trainer = make_trainer(output_dir)
    trainer.train(resume_from_checkpoint=latest_checkpoint(output_dir))
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return f"step {trainer.state.global_step}: weights {zlib.crc32(weights.numpy().tobytes()):08x}"


if __name__ == "__main__":
    print(main(sys.argv[1]))
