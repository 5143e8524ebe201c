"""What the user chose for a run of a loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from signal import Signals
from typing import Literal

from hf_lifecycle.argument_checks import given, read_choice, read_finite
from hf_lifecycle.checkpoint.directory.retention import KeepLast, RetentionPolicy
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.processes.deadline import GivenLimit, TimeLimit
from hf_lifecycle.processes.preemption import SIGNALS, OnPreempt, signals_named
from hf_lifecycle.state.objects import Stateful, check_objects

__all__ = ["OnWorldSizeChange", "RunSettings"]

OnWorldSizeChange = Literal["error", "continue"]


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The arguments of ``TrainingStateManager``, checked.

    Raises:
        ValueError: ``keep`` and ``keep_last`` together, or a choice that there is not.
        TypeError: An argument of another kind.
    """

    objects: Mapping[str, Stateful] = field(default_factory=dict)
    keep_last: int | None = None
    keep: RetentionPolicy | None = None
    seed: int | None = None
    strict: bool = True
    on_world_size_change: OnWorldSizeChange = "error"
    mirror: str | PathLike[str] | Mirror | None = None
    signals: Sequence[str] = SIGNALS
    on_preempt: OnPreempt = "raise"
    time_limit: GivenLimit | TimeLimit | None = None
    elastic: bool = False

    def __post_init__(self) -> None:
        check_objects(self.objects)
        if self.keep is not None and self.keep_last is not None:
            raise ValueError(f"keep={self.keep!r} and keep_last={self.keep_last!r}: pass one of them, not both")
        if self.keep is not None and not isinstance(self.keep, RetentionPolicy):
            raise TypeError(
                f"keep must be a RetentionPolicy, got {given(self.keep)}; for example KeepLast(3), or keep_last=3"
            )
        for name in ("strict", "elastic"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name} must be True or False, got {given(getattr(self, name))}")
        if self.seed is not None and type(self.seed) is not int:
            raise TypeError(f"seed must be a whole number, got {given(self.seed)}")
        read_choice("on_world_size_change", self.on_world_size_change, ("error", "continue"))
        read_choice("on_preempt", self.on_preempt, ("raise", "return"))
        signals_named(self.signals)  # a wrong name is an error here
        object.__setattr__(self, "time_limit", TimeLimit.of(self.time_limit))
        if self.keep_last is not None:
            object.__setattr__(self, "keep_last", int(read_finite("keep_last", self.keep_last, minimum=1, whole=True)))
        if self.mirror is not None:
            object.__setattr__(self, "mirror", Mirror.of(self.mirror))

    @property
    def watched(self) -> tuple[Signals, ...]:
        """Which signals end the loop."""
        return signals_named(self.signals)

    @property
    def limit(self) -> TimeLimit | None:
        """When the loop ends at the latest."""
        return TimeLimit.of(self.time_limit)

    @property
    def second_place(self) -> Mirror | None:
        """Where copies go."""
        return None if self.mirror is None else Mirror.of(self.mirror)

    @property
    def retention(self) -> RetentionPolicy | None:
        """Which checkpoints are kept; None for all."""
        return self.keep if self.keep_last is None else KeepLast(self.keep_last)
