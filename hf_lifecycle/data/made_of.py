"""What the batches of a loader are made of, in text: a few rows of its data; the classes, code and values of its parts.

Promise: nothing of the user's is called but ``len()``, so that no random number is drawn and no row is read by a
dataset's own code. Not seen: rows that only such code makes, and those that a few rows miss.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from hf_lifecycle.data.samplers import drawing_sampler, seedable
from hf_lifecycle.data.standing_in import StandIn
from hf_lifecycle.libraries import is_of_user, library_of
from hf_lifecycle.messages import few
from hf_lifecycle.state.program import code_of, plain_values_of
from hf_lifecycle.state.reachable import attributes_of
from hf_lifecycle.state.values.described import description_digest
from hf_lifecycle.state.values.trees import PLAIN_SCALARS

__all__ = ["made_of", "other_parts", "other_rows", "rows_of"]

_ROWS = 8  # of a dataset, strided over all of it
_DEEPEST = 3
_COLUMNS_AT_MOST = 32
_COLUMNS = (list, tuple, np.ndarray, torch.Tensor)


def made_of(loader: Any) -> dict[str, Any]:
    """The rows of a loader's data, and what dataset, sampler, batch sampler and ``collate_fn`` are."""
    base = getattr(loader, "base_dataloader", loader)
    dataset, sampler, batches, collate = (
        _within(getattr(base, name, None)) for name in ("dataset", "sampler", "batch_sampler", "collate_fn")
    )
    dealt = getattr(batches, "batch_sampler", None)  # by what deals it out to processes
    batches = batches if dealt is None else dealt
    order = sampler if batches is None else batches
    drawing = sampler if drawing_sampler(order) is batches else drawing_sampler(order)
    # What accelerate puts in the place of a RandomSampler, with several processes.
    is_random = seedable(order) is not None
    return {
        "rows": dict(rows_of(dataset)),
        "parts": {
            "dataset": " of ".join(_kinds_of(dataset)),
            "sampler": "RandomSampler" if is_random else type(drawing).__qualname__,
            "batch_sampler": type(batches).__qualname__,
            "collate_fn": getattr(collate, "__qualname__", type(collate).__qualname__),
        },
        "values": {
            f"{name}.{key}": value
            for name, part in (("dataset", dataset), ("collate_fn", collate))
            if is_of_user(type(part))
            for key, value in plain_values_of(part).items()
        },
        "code": code_of(each for part in (dataset, sampler, batches, collate) for each in _held_by(part)),
    }


def other_rows(saved: Mapping[str, Mapping[str, Any]], present: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence on the loaders, by their names, whose data has other rows now."""
    told = [f"{name}: {path}" for name, path, _, _ in _unlike(saved, present, "rows")]
    return [f"the training data has other rows than when the run started ({few(sorted(told))})"] if told else []


def other_parts(
    saved: Mapping[str, Mapping[str, Any]], present: Mapping[str, Mapping[str, Any]], kind: str = "parts"
) -> list[str]:
    """A sentence for each part of a loader that is of another class now, or for each of its values of another kind."""
    return [
        f"the {part} of {name} was {before} when the run started, and is {now} now: the resume is exact only if both "
        "make the same batches"
        for name, part, before, now in _unlike(saved, present, kind)
    ]


def _unlike(
    saved: Mapping[str, Mapping[str, Any]], present: Mapping[str, Mapping[str, Any]], kind: str
) -> Iterator[tuple[str, str, Any, Any]]:
    """What both have of this kind, with another value: its owner, its name, and both values."""
    for name in sorted(saved.keys() & present.keys()):
        now = present[name].get(kind, {})
        for key, before in saved[name].get(kind, {}).items():
            if now.get(key, before) != before:
                yield name, key, before, now[key]


def rows_of(dataset: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Digests of some rows of what has one entry for each row: a table, a list, an array."""
    try:
        count = len(dataset)
    except (TypeError, NotImplementedError):  # a stream
        return
    if library_of(type(dataset).__module__) == "datasets":
        if hasattr(dataset, "with_format"):
            rows = dataset.with_format("arrow")[_some(count)] if count else None
            yield path or "rows", xxhash.xxh3_128_hexdigest(repr(None if rows is None else rows.to_pylist()).encode())
        return
    held = {"": dataset} if type(dataset) in _COLUMNS else attributes_of(dataset)
    for key, value in list(held.items()):
        name = f"{path}.{key}" if path and key else str(key) or path or "rows"
        for column, one in _columns_of(value, count):
            if type(one) in _COLUMNS and getattr(one, "shape", True) and len(one) == count > 0:
                some = [_plain(one[index], 0) for index in _some(count)]
                yield f"{name}.{column}" if column else name, description_digest(some)
        if key and depth < _DEEPEST and isinstance(value, Dataset):
            yield from rows_of(value, name, depth + 1)


def _columns_of(value: Any, count: int) -> list[tuple[str, Any]]:
    """What has an entry for each row, by its name in what holds it."""
    value = attributes_of(value).get("data") if isinstance(value, UserDict) else value  # a tokenizer's result
    if type(value) is dict:
        return [(str(key), one) for key, one in islice(value.items(), _COLUMNS_AT_MOST)]
    if type(value) is tuple and len(value) != count:  # the tensors of a TensorDataset
        return [(str(number), one) for number, one in enumerate(value[:_COLUMNS_AT_MOST])]
    return [("", value)]


def _some(count: int) -> list[int]:
    return sorted({number * (count - 1) // max(1, _ROWS - 1) for number in range(_ROWS)})


def _plain(value: Any, depth: int) -> Any:
    """A row without what has a text of its own making."""
    if type(value) in PLAIN_SCALARS or isinstance(value, np.generic):
        return repr(value) if type(value) is bytes else value
    if type(value) in (torch.Tensor, np.ndarray):
        return value.reshape(-1)[:512]
    if depth < _DEEPEST and type(value) in (list, tuple):
        return [_plain(one, depth + 1) for one in value[:512]]
    if depth < _DEEPEST and type(value) is dict:
        return {str(key): _plain(one, depth + 1) for key, one in value.items()}
    return type(value).__qualname__


def _within(part: Any) -> Any:
    """A part of a loader without what stands in its place."""
    while issubclass(type(part), StandIn):
        part = part.inner
    return part


def _kinds_of(dataset: Any) -> Iterator[str]:
    """The class of a dataset, and those of the datasets in its attributes."""
    for one in _datasets_in(dataset):
        if library_of(type(one).__module__) != "accelerate":  # whose own deals a stream out to processes
            yield type(one).__qualname__


def _datasets_in(dataset: Any, depth: int = 0) -> Iterator[Any]:
    yield dataset
    if depth < _DEEPEST and library_of(type(dataset).__module__) != "datasets":
        for one in list(attributes_of(dataset).values()):
            if isinstance(one, Dataset):
                yield from _datasets_in(one, depth + 1)


def _held_by(part: Any) -> Iterator[Any]:
    """A part of a loader and the datasets in it, with what they hold, such as a transform."""
    for one in _datasets_in(part):
        yield one
        if library_of(type(one).__module__) == "datasets":
            given = getattr(one, "format", None)  # a stream has none
            yield from given["format_kwargs"].values() if isinstance(given, dict) else ()  # set_transform() puts one in
        else:
            yield from attributes_of(one).values()
