"""Runs a loop without a break, and broken off and resumed, everything made afresh each time.

A program is written once, against :class:`Tool`, and run with ``TrainingStateManager`` or as Accelerate's own guide on
checkpoints has it: ``save_state`` into folders named after the step or the epoch, ``load_state``,
``skip_first_batches``.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed

from hf_lifecycle.state.rng.states import capture_rng

from ..harness import BrokenOff, forget_last_attempt
from ..outcome import Outcome, digest, flatten

__all__ = ["Arm", "LoopCase", "Tool", "aligned", "run_broken", "run_unbroken"]

Arm = Literal["manager", "background", "recipe"]


class Tool(ABC):
    """What a program does its loop with."""

    def __init__(self, accelerator: Accelerator, directory: Path, objects: Mapping[str, Any], break_at: int) -> None:
        self.accelerator = accelerator
        self.directory = directory
        self.objects = dict(objects)
        self.batches_seen: list[str] = []
        self.log: list[dict[str, Any]] = []
        self._break_at = break_at

    def trained(self, batch: Any, loss: torch.Tensor) -> None:
        """Note a batch that was trained on; the run may break here."""
        self.batches_seen.append(digest(batch if isinstance(batch, Mapping) else {"batch": batch}))
        self.log.append({"loss": float(loss)})
        if self._break_at and len(self.batches_seen) == self._break_at:
            raise BrokenOff(f"after batch {self._break_at}")

    def logged(self, **row: Any) -> None:
        self.log.append(row)

    @property
    @abstractmethod
    def steps(self) -> int: ...

    @abstractmethod
    def resume(self) -> None: ...

    @abstractmethod
    def epochs(self, count: int) -> Iterable[int]: ...

    @abstractmethod
    def batches(self, loader: Any, **named: Any) -> Iterable[Any]: ...

    @abstractmethod
    def save(self, *, epoch: int | None = None) -> None: ...

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        """Give back what was taken."""
        self.accelerator.free_memory()


class ManagerTool(Tool):
    """With the manager."""

    def __init__(self, *given: Any) -> None:
        from hf_lifecycle import TrainingStateManager

        super().__init__(*given)
        self.manager = TrainingStateManager(self.accelerator, self.directory, objects=self.objects, keep_last=2)

    @property
    def steps(self) -> int:
        return self.manager.progress.step

    def resume(self) -> None:
        self.manager.resume()

    def epochs(self, count: int) -> Iterable[int]:
        return self.manager.epochs(count)

    def batches(self, loader: Any, **named: Any) -> Iterable[Any]:
        return self.manager.batches(loader, **named)

    def save(self, *, epoch: int | None = None) -> None:
        self.manager.save()

    def evaluating(self) -> AbstractContextManager[None]:
        return self.manager.evaluating()

    def close(self) -> None:
        self.manager.close()
        super().close()


class BackgroundTool(ManagerTool):
    """With the manager, whose saves are not waited for."""

    def save(self, *, epoch: int | None = None) -> None:
        self.manager.save(wait=False)


class RecipeTool(Tool):
    """As the guide of Accelerate has it."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._taken = 0
        self._first_epoch, self._skip = 0, 0
        for item in self.objects.values():
            self.accelerator.register_for_checkpointing(item)

    @property
    def steps(self) -> int:
        return self._taken

    def trained(self, batch: Any, loss: torch.Tensor) -> None:
        self._taken += self.accelerator.sync_gradients
        super().trained(batch, loss)

    def resume(self) -> None:
        folders = [path for path in self.directory.iterdir() if path.is_dir()] if self.directory.exists() else []
        if not folders:
            return
        newest = max(folders, key=lambda path: path.stat().st_mtime_ns)
        self.accelerator.load_state(str(newest))
        kind, _, number = newest.name.partition("_")
        if kind == "epoch":
            self._first_epoch = int(number) + 1
            return
        self._taken = int(number)
        batches = self._taken * self.accelerator.gradient_accumulation_steps
        length = len(self.accelerator._dataloaders[0]) if _has_length(self.accelerator._dataloaders[0]) else 10**9
        self._first_epoch, self._skip = batches // length, batches % length

    def epochs(self, count: int) -> Iterable[int]:
        return range(self._first_epoch, count)

    def batches(self, loader: Any, **named: Any) -> Iterable[Any]:
        skip, self._skip = self._skip, 0
        stateful = getattr(loader, "use_stateful_dataloader", False)
        return skip_first_batches(loader, skip) if skip and not stateful else loader

    def save(self, *, epoch: int | None = None) -> None:
        name = f"step_{self._taken}" if epoch is None else f"epoch_{epoch}"
        shutil.rmtree(self.directory / name, ignore_errors=True)
        self.accelerator.save_state(str(self.directory / name))


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) > 0
    except TypeError:
        return False


TOOLS: dict[Arm, type[Tool]] = {"manager": ManagerTool, "background": BackgroundTool, "recipe": RecipeTool}
Program = Callable[[Tool], None]


@dataclass(frozen=True, slots=True)
class LoopCase:
    """One kind of loop that must be exact.

    Attributes:
        name: As in the table and in the test's name.
        about: One line for the reader of the table.
        program: Builds everything, resumes, and loops.
        accelerator: Arguments of the accelerator.
        objects: Makes the objects that are saved by name.
        break_at: The batches, counted in each attempt, after which it breaks off; one for each attempt but the last.
        core: Runs against the oldest supported versions too.
        needs: Packages without which the case is left out.
        resumed_options: What differs in the resumed attempts.
    """

    name: str
    about: str
    program: Callable[[Tool, Mapping[str, Any]], None]
    accelerator: Callable[[], dict[str, Any]] = dict
    objects: Callable[[], dict[str, Any]] = dict
    break_at: tuple[int, ...] = (10,)
    core: bool = False
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    resumed_options: Mapping[str, Any] = field(default_factory=dict)


def attempt(case: LoopCase, directory: Path, arm: Arm, *, break_at: int, resumed: bool) -> tuple[Tool, Outcome | None]:
    """One call of the script. No outcome where it was broken off."""
    forget_last_attempt()
    if not resumed or arm == "recipe":  # what is resumed with the manager must not depend on the script's seed
        set_seed(7)
    accelerator = Accelerator(**{"cpu": True, **case.accelerator()})
    tool = TOOLS[arm](accelerator, directory, case.objects(), break_at)
    options = {**case.options, **(case.resumed_options if resumed else {})}
    try:
        case.program(tool, options)
        assert not break_at, f"{case.name}: no break after {len(tool.batches_seen)} batches"
        return tool, _outcome(tool)
    except BrokenOff:
        return tool, None
    finally:
        tool.close()


def _outcome(tool: Tool) -> Outcome:
    accelerator = tool.accelerator
    scaler = accelerator.scaler
    parts = {
        "weights": dict(flatten([model.state_dict() for model in accelerator._models])),
        "optimizer": dict(flatten([one.state_dict() for one in accelerator._optimizers])),
        "scheduler": dict(flatten([one.state_dict() for one in accelerator._schedulers])),
        "scaler": dict(flatten(scaler.state_dict() if scaler is not None else {})),
        "rng": dict(flatten(capture_rng().state_dict())),
        "stopping": dict(flatten({name: thing.state_dict() for name, thing in tool.objects.items()})),
        "progress": {"steps": tool.steps},
    }
    for leaves in parts.values():  # tensors may go on changing
        for path, value in leaves.items():
            leaves[path] = value.detach().clone() if isinstance(value, torch.Tensor) else value
    return Outcome(0, parts, tool.log, {(number, 0): one for number, one in enumerate(tool.batches_seen)})


def run_unbroken(case: LoopCase, directory: Path, arm: Arm) -> Outcome:
    """Train to the end without a break."""
    _, outcome = attempt(case, directory, arm, break_at=0, resumed=False)
    assert outcome is not None
    return outcome


def run_broken(case: LoopCase, directory: Path, arm: Arm, unbroken: Outcome) -> Outcome:
    """Train, broken off and resumed; batches are numbered so that the last ones are the last of ``unbroken``."""
    for number, break_at in enumerate(case.break_at):
        attempt(case, directory, arm, break_at=break_at, resumed=number > 0)
    _, outcome = attempt(case, directory, arm, break_at=0, resumed=True)
    assert outcome is not None
    first = len(unbroken.batches) - len(outcome.batches)
    assert first != 0 or arm == "recipe", f"{case.name}: began again instead of resuming"
    batches = {(first + number, 0): one for (number, _), one in outcome.batches.items()}
    return replace(outcome, started_at=first, batches=batches)


def aligned(unbroken: Outcome, resumed: Outcome) -> Outcome:
    """``unbroken`` with the log rows of its end alone, as many as ``resumed`` has."""
    return replace(unbroken, log=unbroken.log[len(unbroken.log) - len(resumed.log) :])
