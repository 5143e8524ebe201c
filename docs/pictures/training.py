"""The training that the picture of a run shows: a small GPT-2 on the bytes of one Python file, until it overfits.

Started by ``timeline.py``, which kills it, sends it SIGTERM, and starts it again. It writes a line for every step, so
that its parent knows when.
"""

from __future__ import annotations

import argparse as source
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_lifecycle import LifecycleCallback, latest_checkpoint

LENGTH = 32


class Report(TrainerCallback):
    """Prints the number of every step."""

    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)


def rows() -> list[dict[str, torch.Tensor]]:
    """The file in blocks of bytes."""
    tokens = torch.frombuffer(bytearray(Path(source.__file__).read_bytes()), dtype=torch.uint8).long()
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return [{"input_ids": block, "labels": block} for block in blocks]


def main(output_dir: str) -> None:
    """Train until early stopping, from the newest checkpoint if there is one."""
    set_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    data = rows()
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=1000,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=10,
        save_steps=20,
        save_total_limit=3,
        logging_steps=20,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        GPT2LMHeadModel(config),
        arguments,
        train_dataset=data[:256],
        eval_dataset=data[256:320],
        callbacks=[Report(), LifecycleCallback(patience=4, min_delta=0.02)],
    )
    trainer.train(resume_from_checkpoint=latest_checkpoint(output_dir))


if __name__ == "__main__":
    main(sys.argv[1])
