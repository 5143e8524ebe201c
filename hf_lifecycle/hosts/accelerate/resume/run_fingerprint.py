"""What a loop is like beside its state, compared on resume; and what becomes of another number of processes.

Each difference is graded by what it does to exactness.

With another number of processes is kept: the global order of the batches, where an optimizer step takes as many rows as
before, and the place in it. With ``elastic=True`` batches and random numbers are the same, too. Else those of a rank
are derived from (seed, step, rank), and those of augmentation follow the new ranks. The run continues as a training of
the same data in the same order, and is not called exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from hf_lifecycle.engine.readable import kinds_of
from hf_lifecycle.hosts.accelerate.intercept import loaders_of, models_of, optimizers_of, schedulers_of
from hf_lifecycle.hosts.accelerate.iteration.accumulation import NOTHING_KNOWN
from hf_lifecycle.state.environment import Difference, Grade, capture_environment, compare

__all__ = ["Change", "capture_facts", "change_of", "compare_facts", "loader_facts"]

_LOADER = {"kind": Grade.HARMLESS, "num_workers": Grade.HARMLESS}
_STREAM = {"kind": Grade.HARMLESS, "num_workers": Grade.BREAKS}


def capture_facts(accelerator: Any, world_size: int) -> dict[str, Any]:
    """Environment, settings of the accelerator, and the loaders that it prepared: plain values."""
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
        "data": {f"loader {number}": loader_facts(one) for number, one in enumerate(loaders_of(accelerator))},
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


@dataclass(frozen=True, slots=True)
class Change:
    """From one number of processes to another.

    Attributes:
        was: Processes of the run that saved.
        now: Processes of this one.
        position: The loop's position for the new number.
        problems: What cannot be converted, one sentence each; the position is of no use then.
    """

    was: int
    now: int
    position: dict[str, Any]
    problems: tuple[str, ...]
    elastic: bool = False

    def __str__(self) -> str:
        kept = (
            "same batches, same randomness, sums rounded otherwise"
            if self.elastic
            else "the order of the data is kept, and each rank gets a new random seed"
        )
        return f"{self.now} processes instead of {self.was}: {kept}"

    def convert_schedulers(self, accelerator: Any) -> None:
        """Set the counts of the schedulers that accelerate steps once for each process."""
        for scheduler in _stepped_by_each(accelerator):
            inner = scheduler.scheduler
            last = inner.last_epoch * self.now // self.was
            rates = [base * factor(last) for base, factor in zip(inner.base_lrs, inner.lr_lambdas, strict=True)]
            for group, rate in zip(inner.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            changed = {"last_epoch": last, "_step_count": last + 1, "_last_lr": rates}
            inner.load_state_dict(inner.state_dict() | changed)


def change_of(
    accelerator: Any, saved: Mapping[str, Any], present: Mapping[str, Any], *, elastic: bool = False
) -> Change:
    """The change from the run that ``saved`` tells of to the ``present`` one, both as :func:`capture_facts` has it."""
    was, now = saved["environment"]["world_size"], present["environment"]["world_size"]
    position = dict(saved["parts"]["position"])
    problems: list[str] = []
    loaders = {}
    for name, state in position["loaders"].items():
        place, problem = _convert(name, state["position"], saved, present)
        loaders[name] = {**state, "position": place, "accumulation": NOTHING_KNOWN}
        if (
            objects := state.get("objects")
        ) is not None and "next" in objects:  # it is rank 0's alone, by an old number
            loaders[name]["objects"] = {**objects, "next": {**objects["next"], "mark": None}}
        problems += [problem] if problem is not None else []
        each = [facts["data"].get(name, {}).get("batch_size") for facts in (saved, present)]
        if elastic and each[0] != each[1]:
            problems.append(
                f"{name}: batches of {each[0]} rows are now of {each[1]}; with elastic=True, keep their size"
            )
    for number, scheduler in enumerate(_stepped_by_each(accelerator)):
        kind = type(scheduler.scheduler).__name__
        if not isinstance(scheduler.scheduler, LambdaLR):
            problems.append(
                f"scheduler {number}, a {kind}: accelerate steps it once for each process, and its position cannot "
                "be converted to another number; use split_batches=True or a LambdaLR"
            )
    return Change(was, now, {**position, "loaders": loaders}, tuple(problems), elastic)


def _stepped_by_each(accelerator: Any) -> list[Any]:
    return [
        one
        for one in schedulers_of(accelerator)
        if getattr(one, "step_with_optimizer", False) and not one.split_batches
    ]


def _convert(
    name: str, place: Mapping[str, Any], saved: Mapping[str, Any], present: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """A loader's position for the new number of processes, or why there is none."""
    before, after = (facts["data"].get(name, {}).get("rows") for facts in (saved, present))
    if before is None or after is None:
        inside = place["batch"] is not None
        why = (
            f"{name}: the number of rows that all processes take at once is unknown, so its position cannot be "
            "converted"
        )
        return dict(place), why if inside else None
    steps = [facts["arguments"]["gradient_accumulation_steps"] for facts in (saved, present)]
    if before * steps[0] != after * steps[1]:
        return dict(place), (
            f"{name}: an optimizer step took {before * steps[0]} rows ({before} at once, {steps[0]} times) and would "
            f"now take {after * steps[1]} ({after} at once, {steps[1]} times): set batch size or "
            "gradient_accumulation_steps so that it takes as many as before"
        )
    if place["batch"] is None:
        return dict(place), None
    had, rest = divmod(place["batch"] * before, after)
    if rest:
        return dict(place), (
            f"{name}: {place['batch'] * before} rows were read, which is not a multiple of the batch size {after}"
        )
    return {**place, "batch": had}, None
