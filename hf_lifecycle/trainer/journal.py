"""What happens to a run under Trainer, told to the event log of its output directory; by the main process alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.events import EventLog
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.trainer.part import Part

__all__ = ["Journal", "Listener"]

Listener = Callable[[str, int, Mapping[str, Any]], None]


class Journal(Part):
    """Writes the events of one call of ``train()``, which begins when this is made.

    Args:
        args: Trainer's arguments.
        decision: Early stopping, whose settings are told when training begins, and its end of the run with its reason.
        monitor: The metric that it watches.

    Attributes:
        directory: The output directory, absolute: a relative path is resolved here, once. Invariant: whatever this
            package writes goes there, wherever the working directory is by then.
    """

    key = "journal"

    def __init__(self, args: TrainingArguments, decision: EarlyStopping | None, monitor: str) -> None:
        assert args.output_dir is not None
        self._given = Path(args.output_dir)
        self.directory = Path(os.path.abspath(self._given))
        self._log = EventLog(self.directory) if args.process_index == 0 else None
        self._decision = decision
        self._monitor = monitor
        self._has_stopped = False
        self._goes_on_later = False
        self._listeners: list[Listener] = []
        self._made = time.monotonic()

    def write(
        self, event: str, step: int, *, protected: Sequence[Path] = (), **facts: str | int | float | Path | None
    ) -> None:
        """Tell one event. Paths within the output directory are told as they are called there.

        Args:
            event: What happened.
            step: Optimizer steps done.
            protected: For listeners alone: the checkpoints that no retention removes, as of the moment of the save.
            facts: What else there is to tell.
        """
        if self._log is not None:
            self._log.write(event, step=step, **{name: self._plain(fact) for name, fact in facts.items()})
            for listener in self._listeners:
                listener(event, step, {**facts, "protected": protected})

    def listen(self, listener: Listener) -> None:
        """Let ``listener`` be told of every event as it happens, where this is the main process.

        It is called on whichever thread tells the event, with the event's facts: paths are whole ones. It returns soon
        and does not raise. Told of "committed", it finds the checkpoint in its place, before older ones are removed.
        """
        self._listeners.append(listener)

    def is_of(self, folder: str | Path) -> bool:
        """Whether ``folder``, by whatever name, is the output directory of this training."""
        return Path(folder) == self._given or Path(os.path.abspath(folder)) == self.directory

    def resolved(self, checkpoint: str | Path) -> Path:
        """A checkpoint that Trainer names by the output directory as the user gave it, by its absolute path."""
        path = Path(checkpoint)
        return self.directory / path.name if path.parent == self._given else path

    def _plain(self, fact: str | int | float | Path | None) -> str | int | float | None:
        if isinstance(fact, Path):
            return fact.name if fact.parent == self.directory else str(fact)
        return round(fact, 6) if isinstance(fact, float) else fact

    def begin(self, step: int, attempt: str, resumed_from: Path | None) -> None:
        """Tell that training begins; ``seconds`` is what restoring and proving took."""
        self._has_stopped = self._decision is not None and self._decision.should_stop
        event = "started" if step == 0 else "resumed"
        seconds = time.monotonic() - self._made
        self.write(event, step, seconds=seconds, path=resumed_from, attempt=attempt, **self._watched())

    def _watched(self) -> dict[str, Any]:
        """What early stopping was asked to do, so that it can be drawn later; a default goes without saying."""
        if self._decision is None:
            return {}
        settings, default = self._decision.settings, EarlyStopping().settings
        always = ("patience", "min_delta", "mode")
        told = {name: value for name, value in settings.items() if name in always or value != default[name]}
        return {"monitor": self._monitor, **told}

    def failed(self, step: int, error: BaseException) -> None:
        """Tell what broke off the save at ``step``."""
        self.write("failed", step, why=f"{type(error).__name__}: {error}")

    def preempted(self, step: int, by: str, *, ends_by_itself: bool) -> None:
        """Tell that the signal ``by`` ends training at ``step``; by itself: where it would have ended anyway."""
        self._goes_on_later = not ends_by_itself
        self.write("preempted", step, why=by)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        decision = self._decision
        if decision is not None and decision.should_stop and not self._has_stopped:
            self._has_stopped = True
            self.write("stopped", state.global_step, why=decision.reason)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._goes_on_later:
            self.write("ended", state.global_step, seconds=time.monotonic() - self._made)
