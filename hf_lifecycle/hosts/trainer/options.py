"""What the callback is given, checked where it is written and not when training begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any, Literal

from transformers import TrainingArguments

from hf_lifecycle.argument_checks import given, read_choice, read_name, read_path
from hf_lifecycle.checkpoint.directory.retention import KeepLast, RetentionPolicy
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.engine.failure_policy import OnSaveFailure
from hf_lifecycle.hosts.trainer.resume.world_size import OnWorldSizeChange
from hf_lifecycle.hosts.trainer.stopping import default_mode, default_monitor
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.processes.deadline import GivenLimit, TimeLimit
from hf_lifecycle.processes.preemption import SIGNALS, OnPreempt, signals_named
from hf_lifecycle.state.objects import Stateful, check_objects

__all__ = ["Options"]

_KINDS: dict[str, type] = {
    "monitor": str,
    "early_stopping": EarlyStopping,
    "objects": Mapping,
    "keep": RetentionPolicy,
    "strict": bool,
    "async_save": bool,
    "elastic": bool,
}
_CHOICES = {
    "on_preempt": ("raise", "return"),
    "on_save_failure": ("raise", "continue"),
    "on_world_size_change": ("error", "continue"),
}


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of :class:`~hf_lifecycle.hosts.trainer.callback.LifecycleCallback`, where each is told.

    Raises:
        ValueError: Arguments that exclude each other, or a value that is no choice.
        TypeError: An argument of another kind, or an object without ``state_dict`` and ``load_state_dict``.
    """

    patience: int | None = None
    min_delta: float = 0.0
    monitor: str | None = None
    mode: Literal["min", "max"] | None = None
    early_stopping: EarlyStopping | None = None
    objects: Mapping[str, Stateful] = field(default_factory=dict)
    resume_from: str | PathLike[str] | None = None
    keep: RetentionPolicy | None = None
    strict: bool = True
    signals: Sequence[str] = SIGNALS
    on_preempt: OnPreempt = "raise"
    time_limit: GivenLimit | TimeLimit | None = None
    on_save_failure: OnSaveFailure = "raise"
    on_world_size_change: OnWorldSizeChange = "error"
    mirror: str | PathLike[str] | Mirror | None = None
    async_save: bool = True
    elastic: bool = False

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or kind is bool):
                hint = "; for example KeepLast(3)" if name == "keep" else ""
                raise TypeError(f"{name} must be a {kind.__name__}, got {given(value)}{hint}")
        for name, allowed in _CHOICES.items():
            read_choice(name, getattr(self, name), allowed)
        if self.monitor is not None:
            read_name("monitor", self.monitor)
        if self.mode is not None:
            read_choice("mode", self.mode, ("min", "max"))
        if self.resume_from is not None:
            read_path("resume_from", self.resume_from)
        own = self.patience is not None
        if self.early_stopping is not None and (own or self.min_delta != 0.0 or self.mode is not None):
            raise ValueError("pass either early_stopping or patience, min_delta and mode, not both")
        if not own and self.early_stopping is None and (self.min_delta != 0.0 or self.mode or self.monitor):
            raise ValueError("monitor, mode and min_delta belong to early stopping: pass patience= as well")
        if own:
            EarlyStopping(patience=self.patience, min_delta=self.min_delta)
        check_objects(self.objects)
        signals_named(self.signals)
        object.__setattr__(self, "time_limit", TimeLimit.of(self.time_limit))
        if self.mirror is not None:  # as a Mirror, which shows no password
            object.__setattr__(self, "mirror", Mirror.of(self.mirror))

    def told(self) -> dict[str, Any]:
        """Those that are not as they are by default, as one would give them again; of ``objects`` the names."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        changed = {name: value for name, value in given.items() if value != getattr(_DEFAULT, name)}
        return changed | ({"objects": sorted(self.objects)} if self.objects else {})

    @property
    def second_place(self) -> Mirror | None:
        """Where copies go."""
        return None if self.mirror is None else Mirror.of(self.mirror)

    @property
    def limit(self) -> TimeLimit | None:
        """When training ends at the latest."""
        return TimeLimit.of(self.time_limit)

    def retention(self, args: TrainingArguments) -> RetentionPolicy | None:
        """Which checkpoints are kept; None for all.

        Raises:
            ValueError: Both ``keep`` and ``save_total_limit`` are given.
        """
        limit = args.save_total_limit
        if self.keep is not None and limit is not None:
            raise ValueError(f"keep={self.keep!r} and save_total_limit={limit!r}: pass one of them, not both")
        return KeepLast(limit) if limit is not None and limit >= 1 else self.keep

    def metric(self, args: TrainingArguments) -> str:
        """The name of the metric that checkpoints are judged by."""
        return self.monitor or default_monitor(args)

    def decision(self, args: TrainingArguments) -> EarlyStopping | None:
        """Early stopping by ``patience``, ``min_delta`` and ``mode``; None without ``patience``."""
        if self.patience is None:
            return None
        mode = self.mode or default_mode(args, self.metric(args))
        return EarlyStopping(patience=self.patience, min_delta=self.min_delta, mode="min" if mode == "min" else "max")


_DEFAULT = Options()
