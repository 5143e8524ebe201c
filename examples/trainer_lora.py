"""Trainer with a LoRA adapter of PEFT: only the adapter is trained and saved, and resumes exactly.

    python examples/trainer_lora.py runs/lora

The base model stands for a pretrained one; here it is small and random, so that nothing is downloaded. The task: is a
line of the source of Python's standard library a comment? Kill it, run it again, and compare the last line.
"""

from __future__ import annotations

import email
import sys
import zlib
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_lifecycle import LifecycleCallback, latest_checkpoint

LENGTH = 48


def lines(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Lines of source as bytes, without the comment sign, and whether they had it."""
    rows = []
    for line in (line.strip() for path in sorted(folder.glob("*.py")) for line in path.read_bytes().splitlines()):
        if len(line) > 8:
            content = line.lstrip(b"# ")[:LENGTH].ljust(LENGTH, b"\0")
            tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
            rows.append({"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": int(line[:1] == b"#")})
    return rows


def make_trainer(output_dir: str) -> Trainer:
    """Create everything; the base model comes from its seed, the adapter from the checkpoint."""
    set_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = BertForSequenceClassification(BertConfig(vocab_size=256, max_position_embeddings=LENGTH, **shape))
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["query", "value"], task_type="SEQ_CLS")
    return Trainer(
        model=get_peft_model(base, lora),
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=30,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            save_steps=10,
            save_total_limit=2,
            logging_steps=5,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=lines(Path(email.__file__).parent)[:2000],
        callbacks=[LifecycleCallback()],
    )


def main(output_dir: str) -> str:
    """Train or resume; return a digest of the trained weights."""
    trainer = make_trainer(output_dir)
    trainer.train(resume_from_checkpoint=latest_checkpoint(output_dir))
    trained = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return f"step {trainer.state.global_step}: adapter {zlib.crc32(trained.numpy().tobytes()):08x}"


if __name__ == "__main__":
    print(main(sys.argv[1]))
