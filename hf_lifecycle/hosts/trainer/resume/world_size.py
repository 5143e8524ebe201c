"""A run that goes on with another number of processes: refused, or by choice continued, and never called exact.

Promise: continued is only a run whose optimizer steps are made of the same examples, in the same order: the examples
of a step (per-device batch size, accumulation, processes) are as many as they were. Each rank draws its random numbers
anew, from (seed, step, rank); what is not the ranks' own (early stopping, losses, objects) is what rank 0 saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import TrainingArguments

from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.hosts.trainer.resume.arguments import capture_arguments
from hf_lifecycle.hosts.trainer.resume.source import ResumeSource
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.state.environment import Difference, Grade

__all__ = ["OnWorldSizeChange", "Resized"]

OnWorldSizeChange = Literal["error", "continue"]

_MAY_CHANGE = frozenset({"world_size", "per_device_train_batch_size", "gradient_accumulation_steps"})


def _examples_a_batch(arguments: Mapping[str, Any], world_size: int) -> int:
    """How many examples all ranks together train on in one micro-batch."""
    split = (arguments["accelerator_config"] or {}).get("split_batches", False)
    return int(arguments["per_device_train_batch_size"]) * (1 if split else world_size)


@dataclass(frozen=True, slots=True)
class Resized:
    """What becomes of a checkpoint of ``origin.world_size`` processes.

    Attributes:
        origin: The checkpoint.
        world_size: The number of processes now.
        saved: Examples of one micro-batch of all ranks then.
        present: And now.
        steps: Examples of one optimizer step, then and now.
    """

    origin: ResumeSource
    world_size: int
    saved: int
    present: int
    steps: tuple[int, int]

    @classmethod
    def of(cls, origin: ResumeSource | None, args: TrainingArguments) -> Resized | None:
        """None where the number of processes is what it was."""
        if origin is None or origin.world_size == args.world_size:
            return None
        before, now = origin.saved["arguments"], capture_arguments(args)
        saved, present = _examples_a_batch(before, origin.world_size), _examples_a_batch(now, args.world_size)
        steps = saved * before["gradient_accumulation_steps"], present * now["gradient_accumulation_steps"]
        return cls(origin, args.world_size, saved, present, steps)

    @property
    def said(self) -> str:
        """What is not as it was, for the report."""
        return (
            f"saved by {self.origin.world_size} processes, resumed by {self.world_size}: the order of examples is "
            "kept, each rank draws other random numbers (from seed, step and rank), and sums are rounded differently"
        )

    def require(self, args: TrainingArguments, choice: OnWorldSizeChange) -> None:
        """Raise ``ResumeMismatch`` unless the run may, and can, go on."""
        before, now = self.steps
        keeps = f"per_device_train_batch_size x gradient_accumulation_steps x processes = {before}"
        if choice == "error":
            raise ResumeMismatch(
                self.origin.path,
                [
                    f"it was saved by {self.origin.world_size} processes, and there are {self.world_size} now: every "
                    f"rank would draw other random numbers, and a step would have {now} examples instead of {before}"
                ],
                f"start {self.origin.world_size} processes again, or keep {keeps} and pass "
                'LifecycleCallback(on_world_size_change="continue") to resume anyway, not exactly',
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
