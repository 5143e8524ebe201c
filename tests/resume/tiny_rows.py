"""A few training rows for a tiny model, made of what its forward takes.

Promise: the same rows each time, and None where this module does not know what an architecture is trained on.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

__all__ = ["rows_for"]

ROWS = 8
TOKENS = 8
FIRST_PLAIN_TOKEN = 90  # below it are the special tokens of the tiny configurations
IMAGE_CLASSES = 2


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings = model.get_input_embeddings()
    return int(getattr(embeddings, "num_embeddings", 0) or embeddings.weight.shape[0])


def _text(model: PreTrainedModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    last = _vocabulary(model)
    tokens = torch.randint(min(FIRST_PLAIN_TOKEN, last // 2), last, (TOKENS,), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}


def _image(model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(getattr(config, "num_channels", 3), height, width, generator=generator)


def _llava(model: PreTrainedModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    vision = model.config.vision_config
    row = _text(model, generator)
    placeholders = torch.full(((vision.image_size // vision.patch_size) ** 2,), model.config.image_token_id)
    return {
        "input_ids": torch.cat([placeholders, row["input_ids"]]),
        "labels": torch.cat([torch.full_like(placeholders, -100), row["labels"]]),
        "pixel_values": _image(model, generator),
    }


def _row(model: PreTrainedModel, head: str, generator: torch.Generator) -> dict[str, torch.Tensor] | None:
    takes = inspect.signature(model.forward).parameters
    if model.config.model_type == "llava":
        return _llava(model, generator)
    if head == "IMAGE_CLASSIFICATION" and {"pixel_values", "labels"} <= takes.keys():
        label = torch.randint(IMAGE_CLASSES, (), generator=generator)
        return {"pixel_values": _image(model, generator), "labels": label}
    if {"input_ids", "labels"} <= takes.keys() and model.get_input_embeddings() is not None:
        row = _text(model, generator)
        if head == "SEQUENCE_CLASSIFICATION":
            row["labels"] = torch.randint(2, (), generator=generator)
        return row
    return None


def rows_for(model: PreTrainedModel, head: str) -> list[dict[str, Any]] | None:
    """Rows for :class:`transformers.Trainer`, or None. Image-text models but Llava get text alone."""
    generator = torch.Generator().manual_seed(7)
    rows = [_row(model, head, generator) for _ in range(ROWS)]
    return [row for row in rows if row is not None] or None
