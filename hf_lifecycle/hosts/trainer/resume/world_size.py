"""A run that resumes with another number of processes: refused, or by choice continued, and never called exact.

Promise: continued is only a run whose optimizer steps are made of the same examples, in the same order: the examples
of a step (per-device batch size, accumulation, processes) are as many as they were. With ``elastic=True`` its batches
and random numbers are the same, too; else each rank draws its own anew, from (seed, step, rank). What is not the ranks'
own (early stopping, losses, objects) is what rank 0 saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.data.micro_batches import of_each_rank
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.hosts.trainer.resume.arguments import capture_arguments
from hf_lifecycle.hosts.trainer.resume.source import ResumeSource
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.state.environment import Difference, Grade

__all__ = ["OnWorldSizeChange", "Resized", "depends_on_ranks"]

OnWorldSizeChange = Literal["error", "continue"]

_MAY_CHANGE = frozenset({"world_size", "per_device_train_batch_size", "gradient_accumulation_steps"})


def _examples_a_batch(arguments: Mapping[str, Any], world_size: int) -> int:
    """How many examples all ranks together train on in one micro-batch."""
    split = (arguments["accelerator_config"] or {}).get("split_batches", False)
    return int(arguments["per_device_train_batch_size"]) * (1 if split else world_size)


def depends_on_ranks(args: TrainingArguments, state: TrainerState, model: Any, examples: int | None) -> list[str]:
    """What of an elastic run would become another with another number of processes, said before it trains."""
    a_step = _examples_a_batch(capture_arguments(args), args.world_size) * args.gradient_accumulation_steps
    found = [of_each_rank(model)]
    if examples is not None and (left := examples % a_step) and state.max_steps * a_step > examples - left:
        found.append(
            f"the last step of an epoch has only {left} of {a_step} examples, which each number of processes completes "
            f"or drops in another way; let the data have a multiple of {a_step} rows"
        )
    return [f"elastic=True: {one}" for one in found if one is not None]


@dataclass(frozen=True, slots=True)
class Resized:
    """What becomes of a checkpoint of ``origin.world_size`` processes.

    Attributes:
        saved: Examples of one micro-batch of all ranks then.
        present: And now.
        steps: Examples of one optimizer step, then and now.
        each: Examples of one micro-batch of a rank, then and now.
    """

    origin: ResumeSource
    world_size: int
    saved: int
    present: int
    steps: tuple[int, int]
    each: tuple[int, int]
    elastic: bool

    @classmethod
    def of(cls, origin: ResumeSource | None, args: TrainingArguments, *, elastic: bool = False) -> Resized | None:
        """None where the number of processes is what it was."""
        if origin is None or origin.world_size == args.world_size:
            return None
        before, now = origin.saved["arguments"], capture_arguments(args)
        saved, present = _examples_a_batch(before, origin.world_size), _examples_a_batch(now, args.world_size)
        steps = saved * before["gradient_accumulation_steps"], present * now["gradient_accumulation_steps"]
        each = saved // origin.world_size, present // args.world_size
        return cls(origin, args.world_size, saved, present, steps, each, elastic)

    @property
    def said(self) -> str:
        """What is not as it was, for the report."""
        kept = (
            "same batches, same randomness, sums rounded otherwise"
            if self.elastic and self.each[0] == self.each[1]
            else "the order of examples is kept, each rank draws other random numbers (from seed, step and rank), and "
            "sums are rounded differently"
        )
        return f"saved by {self.origin.world_size} processes, resumed by {self.world_size}: {kept}"

    def require(self, args: TrainingArguments, choice: OnWorldSizeChange) -> None:
        """Raise ``ResumeMismatch`` unless the run may, and can, continue."""
        before, now = self.steps
        keeps = f"per_device_train_batch_size x gradient_accumulation_steps x processes = {before}"
        if self.elastic and choice == "error" and before == now and self.each[0] != self.each[1]:
            raise ResumeMismatch(
                self.origin.path,
                [f"a micro-batch of a process would be of {self.each[1]} examples, before of {self.each[0]}"],
                f"with elastic=True, keep per_device_train_batch_size={self.each[0]} and change "
                "gradient_accumulation_steps (elastic_arguments() does)",
            )
        if choice == "error" and not self.elastic:
            raise ResumeMismatch(
                self.origin.path,
                [
                    f"it was saved by {self.origin.world_size} processes, and there are {self.world_size} now: every "
                    f"rank would draw other random numbers, and a step would have {now} examples instead of {before}"
                ],
                f"start {self.origin.world_size} processes again, or keep {keeps} and pass "
                'LifecycleCallback(on_world_size_change="continue") to resume anyway, not exactly; a run that is '
                "started with elastic=True can change it",
            )
        if before != now:
            raise ResumeMismatch(
                self.origin.path,
                [
                    (
                        f"a step would have {now} examples instead of {before}, so step counts and schedules "
                        "would mean something else"
                    )
                ],
                f"with {self.world_size} processes, keep {keeps}",
            )

    def move(self, position: Position) -> None:
        """Count the position in batches of now."""
        problem = position.rescale(self.saved, self.present)
        if problem is not None:
            raise ResumeMismatch(self.origin.path, [problem], "resume with as many processes as saved it")

    def admit(self, differences: list[Difference]) -> list[Difference]:
        """The differences, less the grades of those that the choice covers."""
        return [replace(one, grade=Grade.HARMLESS) if one.name in _MAY_CHANGE else one for one in differences]
