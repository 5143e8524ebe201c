"""Cases of map-style data: augmentation, collators, samplers, loaders."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, WeightedRandomSampler
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from ..harness import Attempt, Break, Case
from .tiny import NOISES, Rows, bert, labelled_sentences, regression, sentences, tokenizer

__all__ = ["CASES"]


def _augmented(noise: str, run: Attempt, **settings: Any) -> Trainer:
    return regression(run, train=Rows(noise=NOISES[noise]), **settings)


def _masked(run: Attempt, *, collator: dict[str, Any] | None = None, **settings: Any) -> Trainer:
    words = tokenizer()
    return Trainer(
        model=bert("BertForMaskedLM"),
        args=run.args(**settings),
        train_dataset=[words(text) for text in sentences()],
        data_collator=DataCollatorForLanguageModeling(words, **(collator or {})),
        callbacks=run.callbacks(),
    )


def _set_transform(run: Attempt, **settings: Any) -> Trainer:
    from datasets import Dataset

    rows = Rows()
    table = Dataset.from_dict({"x": rows.x.tolist(), "labels": rows.labels.tolist()})

    def jitter(batch: dict[str, Any]) -> dict[str, Any]:
        x, labels = torch.tensor(batch["x"]), torch.tensor(batch["labels"])
        return {"x": list(x + torch.randn_like(x)), "labels": list(labels + NOISES["python"]())}

    table.set_transform(jitter)
    return regression(run, train=table, **{"remove_unused_columns": False, **settings})


class Digits(Rows):
    """Handwritten digits, each cropped at random as it is fetched."""

    def __init__(self, rows: int = 24) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.tensor(digits.images[:rows], dtype=torch.float32) / 16.0
        self.targets = torch.tensor(digits.target[:rows])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        padded = torch.nn.functional.pad(self.images[index], (2, 2, 2, 2))
        top, left = torch.randint(0, 5, (2,)).tolist()
        return {"pixel_values": padded[None, top : top + 8, left : left + 8], "labels": self.targets[index]}


def _vit(run: Attempt, **settings: Any) -> Trainer:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10, "hidden_dropout_prob": 0.1}
    torch.manual_seed(7)
    model = ViTForImageClassification(ViTConfig(**shape, **image))
    return Trainer(model=model, args=run.args(**settings), train_dataset=Digits(), callbacks=run.callbacks())


class OwnGenerator(Rows):
    """Noise from generators that belong to the dataset: one of each kind."""

    def __init__(self, rows: int = 24) -> None:
        super().__init__(rows)
        self.python, self.numpy = random.Random(5), np.random.default_rng(5)
        self.torch = torch.Generator().manual_seed(5)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = self.python.random() + self.numpy.standard_normal() + torch.randn((), generator=self.torch).item()
        return {"x": self.x[index] + noise, "labels": self.labels[index]}


class _WeightedTrainer(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        return WeightedRandomSampler(torch.arange(1.0, 25.0).tolist(), 24)


class _Roaming(Sampler[int]):
    """Draws each index from torch's global generator when it is asked for it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.rows):
            yield int(torch.randint(0, self.rows, ()).item())


class _RoamingTrainer(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        return _Roaming(24)


class _OwnLoaderTrainer(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(self.train_dataset, batch_size=4, shuffle=True, num_workers=0)
        return self.accelerator.prepare(loader)


class _OwnGeneratorTrainer(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        shuffle = torch.Generator().manual_seed(11)
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=4, shuffle=True, generator=shuffle))


def _grouped(run: Attempt) -> Trainer:
    by_length = (
        {"train_sampling_strategy": "group_by_length"}
        if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
        else {"group_by_length": True}
    )
    words = tokenizer()
    return Trainer(
        model=bert("BertForSequenceClassification"),
        args=run.args(**by_length),
        train_dataset=labelled_sentences(),
        data_collator=DataCollatorWithPadding(words),
        processing_class=words,
        callbacks=run.callbacks(),
    )


def _plain(name: str, about: str, rows: int = 24, **settings: Any) -> Case:
    return Case(name, about, lambda run: regression(run, train=Rows(rows), **settings))


def _persistent(run: Attempt) -> Trainer:
    return _masked(run, dataloader_num_workers=2, dataloader_persistent_workers=True)


def _augmentation_cases() -> Iterator[Case]:
    for noise in NOISES:
        for workers in (0, 2):
            yield Case(
                f"augment_{noise}_{workers}",
                f"augmentation by {noise}'s global generator, {workers} workers",
                # Bound now: a lambda would see the last of the loop.
                lambda run, noise=noise, workers=workers: _augmented(noise, run, dataloader_num_workers=workers),
                core=noise == "numpy",
            )


CASES = (
    *_augmentation_cases(),
    Case("mlm_0", "random masking by the collator", _masked, core=True),
    Case("mlm_2", "the same in 2 workers", lambda run: _masked(run, dataloader_num_workers=2), core=True),
    Case("mlm_persistent", "the same in 2 persistent workers", _persistent),
    Case("mlm_seed", "a collator with its own seed", lambda run: _masked(run, collator={"seed": 5})),
    Case(
        "mlm_seed_2",
        "the same in 2 workers",
        lambda run: _masked(run, collator={"seed": 5}, dataloader_num_workers=2),
    ),
    Case("set_transform_0", "datasets.set_transform that draws random numbers", _set_transform, needs=("datasets",)),
    Case(
        "set_transform_2",
        "the same in 2 workers",
        lambda run: _set_transform(run, dataloader_num_workers=2),
        needs=("datasets",),
    ),
    Case("vit_crops_0", "random crops of digits through a ViT", _vit, needs=("sklearn",)),
    Case("vit_crops_2", "the same in 2 workers", lambda run: _vit(run, dataloader_num_workers=2), needs=("sklearn",)),
    Case("own_generators_0", "a dataset with its own generators", lambda run: regression(run, train=OwnGenerator())),
    Case(
        "own_generators_2",
        "the same in 2 workers",
        lambda run: regression(run, train=OwnGenerator(), dataloader_num_workers=2),
    ),
    Case("weighted", "WeightedRandomSampler, second epoch", lambda run: regression(run, kind=_WeightedTrainer)),
    Case(
        "roaming",
        "a sampler that draws from the global generator at each index, second epoch",
        lambda run: regression(run, kind=_RoamingTrainer),
        core=True,
    ),
    Case(
        "roaming_first_epoch",
        "the same, in the first epoch",
        lambda run: regression(run, kind=_RoamingTrainer),
        breaks=(Break(5),),
    ),
    Case(
        "not_seedable",
        "use_seedable_sampler=False",
        lambda run: regression(run, accelerator_config={"use_seedable_sampler": False}),
    ),
    _plain("data_seed", "data_seed", data_seed=99),
    _plain("drop_last", "dataloader_drop_last", rows=26, dataloader_drop_last=True),
    _plain("ragged_batch", "a last batch that is smaller", rows=26),
    _plain("batch_of_one", "batches of one row", rows=6, per_device_train_batch_size=1),
    Case("length_grouped", "batches grouped by length, padded by the collator", _grouped),
    Case(
        "own_loader",
        "get_train_dataloader with its own loader",
        lambda run: regression(run, kind=_OwnLoaderTrainer, train=Rows()),
    ),
    Case(
        "own_loader_generator",
        "the same with its own generator",
        lambda run: regression(run, kind=_OwnGeneratorTrainer),
    ),
    Case(
        "workers_0_to_2",
        "resumed with 2 workers in place of none",
        lambda run: _augmented("numpy", run),
        resumed_options={"args": {"dataloader_num_workers": 2}},
        core=True,
    ),
    Case(
        "workers_2_to_0",
        "resumed with no workers in place of 2",
        lambda run: _augmented("torch", run, dataloader_num_workers=run.options.get("workers", 2)),
        resumed_options={"workers": 0},
    ),
)
