"""What a loop is like beside its state: compared on resume, each difference graded by what it does to exactness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from hf_lifecycle.engine.readable import kinds_of
from hf_lifecycle.hosts.accelerate.intercept import loaders_of, models_of, optimizers_of, schedulers_of
from hf_lifecycle.state.environment import Difference, Grade, capture_environment, compare

__all__ = ["capture_facts", "compare_facts", "loader_facts"]

_LOADER = {"kind": Grade.HARMLESS, "num_workers": Grade.HARMLESS}
_STREAM = {"kind": Grade.HARMLESS, "num_workers": Grade.BREAKS}


def capture_facts(accelerator: Any, world_size: int, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Environment, settings of the accelerator, and the loaders that it prepared or that are ``beside``."""
    loaders = {f"loader {number}": one for number, one in enumerate(loaders_of(accelerator))}
    return {
        "environment": capture_environment(world_size=world_size),
        "arguments": {
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "mixed_precision": str(accelerator.mixed_precision),
            "distributed_type": str(accelerator.distributed_type.value),
            "split_batches": bool(accelerator.split_batches),
            "models": len(models_of(accelerator)),
            "optimizers": len(optimizers_of(accelerator)),
            "schedulers": len(schedulers_of(accelerator)),
        },
        "kinds": kinds_of(
            {f"optimizer {number}": one for number, one in enumerate(optimizers_of(accelerator))}
            | {f"scheduler {number}": one for number, one in enumerate(schedulers_of(accelerator))}
        ),
        "data": {name: loader_facts(one) for name, one in {**beside, **loaders}.items()},
    }


def compare_facts(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[Difference]:
    """Everything that differs. Loaders that one side does not have are skipped: they may come, or be done with."""
    found = [
        *compare(saved["environment"], present["environment"]),
        *compare(saved["arguments"], present["arguments"], {}, otherwise=Grade.BREAKS),
    ]
    for name in saved["data"].keys() & present["data"].keys():
        stream = saved["data"][name]["is_stream"]
        differences = compare(saved["data"][name], present["data"][name], _STREAM if stream else _LOADER)
        found += [Difference(f"{name}, {one.name}", one.saved, one.present, one.grade) for one in differences]
    return found


def loader_facts(loader: Any) -> dict[str, Any]:
    """What decides a loader's batches, as far as that can be told without iterating it: plain values."""
    base = getattr(loader, "base_dataloader", loader)
    sized = (getattr(base, name, None) for name in ("batch_sampler", "sampler"))
    sizes = [getattr(base, "batch_size", None), *(getattr(one, "batch_size", None) for one in sized)]
    return {
        "kind": type(base).__qualname__,
        "is_stream": not isinstance(base, DataLoader) or isinstance(base.dataset, IterableDataset),
        "examples": _length(getattr(base, "dataset", None)),
        "batch_size": next((size for size in sizes if size is not None), None),
        "num_workers": getattr(base, "num_workers", None),
        "rows": _rows_at_once(loader, base),
    }


def _rows_at_once(loader: Any, base: Any) -> int | None:
    """How many rows all processes together take with one batch; None where that is not accelerate's to decide."""
    sampler = getattr(base, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None)
    if hasattr(loader, "slice_fn"):  # one process deals its batches out
        processes = 1 if loader.split_batches else loader.state.num_processes
        return None if size is None else size * processes
    for sharded in (sampler, getattr(base, "dataset", None)):
        processes, each = getattr(sharded, "num_processes", None), getattr(sharded, "batch_size", None)
        if processes is not None and each is not None:
            return int(each * (1 if getattr(sharded, "split_batches", False) else processes))
    if dist.is_initialized() and dist.get_world_size() > 1:
        return None
    return size


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None
