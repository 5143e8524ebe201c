"""A training script under Trainer, compared with itself: never interrupted, and interrupted and resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from hf_lifecycle.checkpoint.directory.admission import latest_checkpoint
from hf_lifecycle.state.fingerprint import module_tensors
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.rng.states import capture_rng
from hf_lifecycle.testing.attempts import BrokenOff, end_workers, forget_last_attempt, prove
from hf_lifecycle.testing.outcome import WALL_CLOCK, Outcome, digest, keep, read
from hf_lifecycle.testing.report import Report

__all__ = ["Recorder", "assert_resumes_exactly"]


@dataclass
class Recorder(TrainerCallback):
    """Records a run: :meth:`attach` it to the trainer after all other callbacks.

    Args:
        trainer: The trainer; its ``training_step`` is wrapped.
        watched: More things whose state counts, by name: objects with ``state_dict()``, or functions without arguments.
        with_trail: Whether to digest random numbers, losses and weights at every step.
    """

    trainer: Trainer
    watched: Mapping[str, Any] = field(default_factory=dict)
    with_trail: bool = False
    started_at: int = -1
    batches: dict[tuple[int, int], str] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    trail: dict[int, dict[str, str]] = field(default_factory=dict)

    def attach(self) -> None:
        """Listen to the trainer."""
        training_step = self.trainer.training_step
        micro = {"step": -1, "index": 0}

        def recording_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            step = self.trainer.state.global_step
            micro.update(step=step, index=micro["index"] + 1 if step == micro["step"] else 0)
            self.batches[step, micro["index"]] = digest(dict(inputs))
            self._note(step + 1, f"RNG states{_at(micro['index'])}", lambda: capture_rng().state_dict())
            self._note(step + 1, f"batches{_at(micro['index'])}", lambda: self.batches[step, micro["index"]])
            loss = training_step(model, inputs, *args, **kwargs)
            self._note(step + 1, f"loss{_at(micro['index'])}", lambda: loss)
            return loss

        self.trainer.training_step = recording_step  # type: ignore[method-assign]
        self.trainer.add_callback(self)

    def _note(self, step: int, kind: str, tree: Any) -> None:
        if self.with_trail:
            self.trail.setdefault(step, {})[kind] = digest(tree())

    def _note_weights(self, step: int) -> None:
        model: Any = self.trainer.model
        self._note(step, "weights", lambda: module_tensors(unwrapped(model)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.started_at = state.global_step
        self._note_weights(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._note_weights(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        trainer: Any = self.trainer
        scaler = trainer.accelerator.scaler
        best = state.best_model_checkpoint
        self.parts = {
            "weights": keep(trainer.model.state_dict()),
            "optimizer": keep(trainer.optimizer.state_dict()),
            "scheduler": keep(trainer.lr_scheduler.state_dict()),
            "scaler": keep(scaler.state_dict() if scaler is not None else {}),
            "rng": keep(capture_rng().state_dict()),
            "stopping": keep({name: read(thing) for name, thing in self.watched.items()}),
            "progress": {
                "global_step": state.global_step,
                "epoch": state.epoch,
                "best_metric": state.best_metric,
                "best_checkpoint": Path(best).name if best is not None else None,
            },
        }

    def outcome(self) -> Outcome:
        """What was recorded."""
        rows = [
            {key: value for key, value in row.items() if not key.endswith(WALL_CLOCK)}
            for row in self.trainer.state.log_history
        ]
        return Outcome(self.started_at, self.parts, rows, dict(self.batches), self.trail)


def _at(micro_batch: int) -> str:
    return f" of micro-batch {micro_batch + 1}" if micro_batch else ""


class _Breaker(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step >= self._step:
            raise BrokenOff


def assert_resumes_exactly(
    make_trainer: Callable[[str], Trainer],
    break_at: Iterable[int | Sequence[int]],
    *,
    directory: str | os.PathLike[str] | None = None,
) -> Report:
    """Train without a break, without a break once more, and interrupted and resumed; all must end with the same bits.

    The breaks are exceptions in this process; before each run accelerate's singletons are forgotten and the global
    random number generators are set to some place, as a new process would have them.

    Args:
        make_trainer: Makes a trainer, with everything it needs made afresh, whose ``output_dir`` is the directory that
            it is given. It is called some times.
        break_at: The steps after which a run is interrupted, each by a run of its own; a sequence in it is one run that
            is interrupted several times. The run must have saved something before.
        directory: Where the runs are made, in folders that must not be there yet. Default: a temporary directory that
            is removed.

    Returns:
        What was compared.

    Raises:
        NotExact: A run ended differently; names what differed first, and since which step.
        ValueError: ``break_at`` is empty, after the end of the run, or before the first checkpoint; or the trainer
            has another ``output_dir``.

    Example:
        >>> from hf_lifecycle.testing import assert_resumes_exactly
        >>> def test_resume():  # doctest: +SKIP
        ...     print(assert_resumes_exactly(make_trainer, break_at=[5, 12, (3, 9)]))
    """

    return prove(partial(_train, make_trainer), break_at, directory)


def _train(make_trainer: Callable[[str], Trainer], folder: Path, broken_at: int | None) -> Outcome:
    forget_last_attempt()
    trainer = make_trainer(str(folder))
    if trainer.args.output_dir is None or Path(trainer.args.output_dir).resolve() != folder.resolve():
        raise ValueError(f"make_trainer: output_dir is {trainer.args.output_dir!r}, but {str(folder)!r} was given")
    recorder = Recorder(trainer, with_trail=True)
    recorder.attach()
    if broken_at is not None:
        trainer.add_callback(_Breaker(broken_at))
    try:
        trainer.train(resume_from_checkpoint=latest_checkpoint(folder))
    except BrokenOff:
        pass
    finally:
        end_workers(trainer.callback_handler.train_dataloader)
    return recorder.outcome()
