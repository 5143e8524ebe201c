"""The tiny models and data that the cases are made of. The same each time they are made."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback

from ..harness import Attempt

__all__ = [
    "NOISES",
    "Regressor",
    "Rows",
    "bert",
    "labelled_sentences",
    "regression",
    "sentences",
    "tokenizer",
]

FEATURES = 8


class Regressor(nn.Module):
    """Not a ``PreTrainedModel``: a small network with dropout, and a loss of its own."""

    def __init__(self, *, dropout: float = 0.2, norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(FEATURES, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 1)]
        self.layers = nn.Sequential(*layers[:1], *([nn.BatchNorm1d(32)] if norm else []), *layers[1:])

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.layers(x).squeeze(-1)
        return (
            {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}
            if labels is not None
            else {"logits": logits}
        )


def _python_noise() -> float:
    return random.gauss(0.0, 1.0)


def _numpy_noise() -> float:
    return float(np.random.randn())


def _torch_noise() -> float:
    return torch.randn(()).item()


# One draw from each global generator. Functions with names: a worker may have to unpickle them.
NOISES: dict[str, Callable[[], float]] = {"python": _python_noise, "numpy": _numpy_noise, "torch": _torch_noise}


class Rows(Dataset):
    """Rows of numbers with a target; with ``noise``, a draw is added to each row that is fetched."""

    def __init__(self, rows: int = 24, *, noise: Callable[[], float] | None = None, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, FEATURES, generator=generator)
        self.labels = self.x.sum(dim=1) + torch.randn(rows, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = self.x[index]
        return {"x": x + self.noise() if self.noise is not None else x, "labels": self.labels[index]}


def regression(
    run: Attempt,
    *,
    train: Any = None,
    model: nn.Module | None = None,
    callbacks: list[TrainerCallback] | None = None,
    kind: type[Trainer] = Trainer,
    trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of :class:`Regressor` on :class:`Rows`; ``settings`` are training arguments."""
    torch.manual_seed(7)
    return kind(
        model=model if model is not None else Regressor(),
        args=run.args(**settings),
        train_dataset=train if train is not None else Rows(),
        eval_dataset=Rows(12, seed=2),
        callbacks=run.callbacks() if callbacks is None else callbacks,
        **(trainer or {}),
    )


WORDS = ["the", "a", "model", "batch", "step", "seed", "break", "resume", "save", "load", "loss", "epoch", "rank"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer made here, of the words that :func:`sentences` uses."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    specials |= {"sep_token": "[SEP]", "mask_token": "[MASK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    vocabulary = {word: index for index, word in enumerate([*specials.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **specials)


def sentences(rows: int = 24, seed: int = 3) -> list[str]:
    """Sentences of different lengths."""
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(4, 12))) for _ in range(rows)]


def labelled_sentences(rows: int = 24) -> list[dict[str, Any]]:
    """Sentences as token ids, each with one of two labels."""
    words = tokenizer()
    return [{**words(text), "labels": index % 2} for index, text in enumerate(sentences(rows))]


def bert(head: str, **settings: Any) -> Any:
    """A BERT of one layer with the head that is named: ``BertForMaskedLM`` and so on."""
    import transformers

    torch.manual_seed(7)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=32, max_position_embeddings=32, **{**shape, **settings})
    return getattr(transformers, head)(config)
