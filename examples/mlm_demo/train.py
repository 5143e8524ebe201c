"""Train a small byte-level masked language model on the source of Python's own standard library.

An ordinary training script; one line makes it exact, ``callbacks=[LifecycleCallback(...)]``. Run it again after it was
interrupted, and it resumes from its newest checkpoint::

    python train.py --output-dir runs/mlm                        # with LifecycleCallback
    python train.py --output-dir runs/stock --callback stock     # with transformers' own callback

Each step is reported on standard output as one line of JSON for ``demo.py``, which starts this script, kills it and
starts it again. Nothing is downloaded. It trains on the CPU, so that every machine can run it.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from hf_lifecycle import LifecycleCallback


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained. Lengths are in bytes, which are the model's tokens."""

    hidden: int = 192
    layers: int = 3
    block: int = 64
    batch: int = 8
    train_blocks: int = 800
    eval_blocks: int = 80
    max_steps: int = 160
    eval_steps: int = 10
    save_steps: int = 20
    learning_rate: float = 1e-3
    patience: int = 7
    min_delta: float = 0.1


FULL = Size()
QUICK = Size(
    hidden=32,
    layers=1,
    block=32,
    train_blocks=96,
    eval_blocks=16,
    max_steps=30,
    eval_steps=5,
    save_steps=10,
    patience=3,
)


def source_files() -> Iterator[Path]:
    """The standard library's top-level modules, always in the same order."""
    yield from sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda path: path.name)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and three special tokens, made here rather than downloaded."""
    special = ["[PAD]", "[UNK]", "[MASK]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


class Blocks(Dataset[dict[str, list[int]]]):
    """Consecutive blocks of the same number of tokens; each is one example."""

    def __init__(self, blocks: list[list[int]]) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.blocks[index]}


def read_corpus(tokenizer: PreTrainedTokenizerFast, size: Size) -> tuple[Blocks, Blocks]:
    """The training and the evaluation blocks; the latter are spread evenly over the text."""
    wanted = size.train_blocks + size.eval_blocks
    tokens: list[int] = []
    for path in source_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) >= wanted * size.block:
            break
    blocks = [tokens[start : start + size.block] for start in range(0, wanted * size.block, size.block)]
    every = wanted // size.eval_blocks
    held_out = set(range(0, size.eval_blocks * every, every))
    return (
        Blocks([block for index, block in enumerate(blocks) if index not in held_out]),
        Blocks([block for index, block in enumerate(blocks) if index in held_out]),
    )


def make_model(tokenizer: PreTrainedTokenizerFast, size: Size) -> BertForMaskedLM:
    """BERT with its usual dropout of 0.1."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 16,
        intermediate_size=4 * size.hidden,
        max_position_embeddings=size.block,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForMaskedLM(config)


class TellSteps(TrainerCallback):
    """Writes each step to standard output as one line of JSON. It draws no random numbers and changes nothing."""

    def tell(self, **facts: Any) -> None:
        print(json.dumps(facts), flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(began_at=state.global_step, of=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(step=state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(eval_loss=kwargs["metrics"]["eval_loss"])


def rng_states() -> dict[str, torch.Tensor]:
    """Every host generator's state, each as one tensor."""
    _, words, position, has_gauss, gauss = np.random.get_state()
    version, python_words, python_gauss = random.getstate()
    return {
        "python": torch.tensor(python_words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(words, dtype=np.int64)),
        "positions": torch.tensor([position, has_gauss, gauss, version, python_gauss or 0.0], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }


def record_end(trainer: Trainer, stopping_state: dict[str, Any], path: Path) -> None:
    """Write the final state of the run, read from the live objects, for ``comparison.py``."""
    assert trainer.optimizer is not None
    assert trainer.lr_scheduler is not None
    torch.save(
        {
            "weights": {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()},
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "rng": rng_states(),
            "log": trainer.state.log_history,
            "stopping": {
                "stopped at step": trainer.state.global_step,
                "best metric": trainer.state.best_metric,
                "best at step": trainer.state.best_global_step,
                **stopping_state,
            },
        },
        path,
    )


def training_arguments(output_dir: str, size: Size) -> TrainingArguments:
    return TrainingArguments(
        output_dir=output_dir,
        max_steps=size.max_steps,
        per_device_train_batch_size=size.batch,
        per_device_eval_batch_size=4 * size.batch,
        learning_rate=size.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=size.max_steps // 12,
        logging_steps=size.eval_steps,
        eval_strategy="steps",
        eval_steps=size.eval_steps,
        save_strategy="steps",
        save_steps=size.save_steps,
        save_total_limit=2,
        dataloader_num_workers=2,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        # Stock early stopping keeps its counter over a resume only with this; the comparison should be fair.
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def early_stopping(kind: str, size: Size) -> TrainerCallback:
    """The line that makes the difference."""
    if kind == "stock":
        return EarlyStoppingCallback(early_stopping_patience=size.patience, early_stopping_threshold=size.min_delta)
    return LifecycleCallback(patience=size.patience, min_delta=size.min_delta)


def stopping_state(trainer: Trainer) -> dict[str, Any]:
    """The state of early stopping at the end, with either callback."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            return {"evaluations without improvement": callback.early_stopping_patience_counter}
        if isinstance(callback, LifecycleCallback) and callback.early_stopping is not None:
            return callback.early_stopping.state_dict()
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--callback", choices=["lifecycle", "stock"], default="lifecycle")
    parser.add_argument("--quick", action="store_true", help="a toy size, for tests")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL

    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)  # the demo trains two models side by side
    set_seed(17)
    tokenizer = byte_tokenizer()
    train_blocks, eval_blocks = read_corpus(tokenizer, size)
    trainer = Trainer(
        model=make_model(tokenizer, size),
        args=training_arguments(options.output_dir, size),
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.15),
        callbacks=[TellSteps(), early_stopping(options.callback, size)],
    )
    output_dir = Path(options.output_dir)
    newest = get_last_checkpoint(options.output_dir) if output_dir.is_dir() else None
    trainer.train(resume_from_checkpoint=newest)
    record_end(trainer, stopping_state(trainer), output_dir / "end.pt")


if __name__ == "__main__":
    main()
