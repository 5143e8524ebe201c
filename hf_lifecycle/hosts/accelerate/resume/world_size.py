"""Resuming with another number of processes: what can be converted, what is refused, and what is only said.

Kept: the global order of the batches, where an optimizer step takes as many rows as before, and the place in it. With
``elastic=True`` batches and random numbers are the same, too. Else those of a rank are derived from (seed, step, rank),
and those of augmentation follow the new ranks. The run continues as a training of the same data in the same order, and
is not called exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from hf_lifecycle.hosts.accelerate.intercept import schedulers_of
from hf_lifecycle.hosts.accelerate.iteration.accumulation import NOTHING_KNOWN

__all__ = ["Change", "change_of"]


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
