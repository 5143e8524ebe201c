"""LifecycleCallback: add it to a Trainer, and a run that is interrupted and resumed ends as if it had not been.

The callback is a composite. Each of its parts has one concern; every event goes to them in the order of
:meth:`LifecycleCallback._make_parts`. Trainer's events, in the order in which a run raises them::

    on_train_begin ─ (evaluation on start) ─┐
      on_epoch_begin                        │ loader iterated, batches fetched one ahead
        on_step_begin                       │ forward, backward
        on_pre_optimizer_step, on_optimizer_step, on_step_end
        [on_log] [on_prediction_step…, on_evaluate] [on_save]
      on_epoch_end  [on_log] [on_evaluate] [on_save]
    on_train_end

Not promised: exactness for what draws from the operating system, for training code that keeps state where it is not
found (pass it as ``objects``), and on other hardware or other versions; the last is reported on resume.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.directory.retention import RetentionPolicy
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.engine.failure_policy import FailurePolicy, OnSaveFailure
from hf_lifecycle.engine.preemption import EndBySignal
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.hosts.trainer.component import Component, Event, StepEvents
from hf_lifecycle.hosts.trainer.host import callbacks_like, report_missing_names
from hf_lifecycle.hosts.trainer.intercept import LOOP
from hf_lifecycle.hosts.trainer.journal import Journal
from hf_lifecycle.hosts.trainer.method_patching import give_back
from hf_lifecycle.hosts.trainer.options import Options
from hf_lifecycle.hosts.trainer.preemption import Preemption
from hf_lifecycle.hosts.trainer.resume.load_guard import LoadGuard
from hf_lifecycle.hosts.trainer.resume.pending_events import PendingEvents
from hf_lifecycle.hosts.trainer.resume.schedule import Schedule
from hf_lifecycle.hosts.trainer.resume.start import Resume
from hf_lifecycle.hosts.trainer.resume.weights import Weights
from hf_lifecycle.hosts.trainer.resume.world_size import OnWorldSizeChange
from hf_lifecycle.hosts.trainer.run_state.adapter_merging import AdapterMerging
from hf_lifecycle.hosts.trainer.run_state.attributes import Attributes
from hf_lifecycle.hosts.trainer.run_state.data_objects import DataState
from hf_lifecycle.hosts.trainer.run_state.loss_accumulator import LossAccumulator
from hf_lifecycle.hosts.trainer.run_state.outside_model import Outside
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.hosts.trainer.run_state.randomness import Randomness
from hf_lifecycle.hosts.trainer.run_state.retries import Retries
from hf_lifecycle.hosts.trainer.run_state.stream_position import StreamPlace
from hf_lifecycle.hosts.trainer.saves.after_save import AfterSave
from hf_lifecycle.hosts.trainer.saves.background import Background
from hf_lifecycle.hosts.trainer.saves.output_directory import recover_output_dir
from hf_lifecycle.hosts.trainer.saves.rank_state import Checkpoints
from hf_lifecycle.hosts.trainer.saves.staging import Staging
from hf_lifecycle.hosts.trainer.saves.unresumable import Unresumable
from hf_lifecycle.hosts.trainer.stopping import Stopping
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.processes.deadline import GivenLimit
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.preemption import SIGNALS, OnPreempt, put_back_left_over, signals_named
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.objects import Stateful

__all__ = ["LifecycleCallback"]

logger = logging.getLogger(__name__)


class LifecycleCallback(TrainerCallback):
    """Exact resume and early stopping for ``transformers.Trainer``.

    Add it as the last callback, so that it sees what the others request. Resume with
    ``train(resume_from_checkpoint=...)`` as always. Exactness compares two runs that both use the callback.

    Args:
        patience: Stop after this many evaluations without improvement. None: no early stopping.
        min_delta: The gain that an improvement has to exceed, in units of the metric.
        monitor: The metric, with or without ``eval_``. Default: ``metric_for_best_model``, else ``eval_loss``.
        mode: ``"min"`` or ``"max"``. Default: ``greater_is_better`` if it belongs to this metric, else ``"min"`` for
            names that end in ``loss`` and ``"max"`` for others.
        early_stopping: An ``EarlyStopping`` with more options, instead of ``patience``, ``min_delta`` and ``mode``.
        objects: More objects to save by name: any with ``state_dict()`` and ``load_state_dict()``, such as an EMA.
        resume_from: The checkpoint directory, if the callback cannot find it by itself.
        keep: Which checkpoints to keep, such as ``KeepLast(2) | KeepBest(1, "max")``. The best is judged by the metric
            that early stopping watches or would watch. Default: ``save_total_limit``; give only one of the two.
        strict: Whether a difference that breaks exactness is an error on resume. If False, it is a warning.
        signals: Signals that save the current step and end training. A second Ctrl-C ends at once. You may add others,
            such as ``"SIGUSR1"``; ``()`` for none.
        on_preempt: What happens after that save. ``"raise"``: what the signal would have done (``KeyboardInterrupt``,
            the end of the process, another handler). ``"return"``: ``train()`` returns; see :attr:`preempted`.
        time_limit: End training, saved, before this time: seconds or a timedelta from its begin, a datetime, or
            ``"auto"`` for what SLURM says. Then as for a signal: ``"raise"`` raises SIGTERM.
        on_save_failure: What to do when a checkpoint cannot be written (full disk, I/O error, permission): ``"raise"``,
            or ``"continue"`` to warn, train on, and try again at the next save. Earlier checkpoints are never lost.
        mirror: Where committed checkpoints are copied in the background: a folder on a mounted drive, an fsspec URL
            such as ``s3://bucket/run``, or a :class:`Mirror` with more settings. Pass it to
            :func:`latest_checkpoint` too.
        elastic: Whether batches and random numbers depend on the micro-batch and not on the rank, so that the run may
            be resumed with another number of processes (see docs/elastic.md).
        on_world_size_change: ``"continue"``: resume with another number of processes, not exactly, if a step still has
            the same number of examples. Default: it is an error, unless ``elastic=True``.
        async_save: Whether training continues while a checkpoint is written, if the first save has proved that this
            gives the same files; else Trainer saves, and one line says why. A failed save is raised at the next one.

    Attributes:
        preempted: The name of the signal that ended the last training, or ``"time limit"``, or None.

    Raises:
        ValueError: Two arguments exclude each other.
        TypeError: An argument has the wrong type, or an object is without ``state_dict`` and ``load_state_dict``.

    Example:
        >>> from hf_lifecycle import LifecycleCallback
        >>> callback = LifecycleCallback(patience=3)
        >>> # Trainer(..., callbacks=[callback]).train(resume_from_checkpoint=True)
    """

    def __init__(
        self,
        *,
        patience: int | None = None,
        min_delta: float = 0.0,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        early_stopping: EarlyStopping | None = None,
        objects: Mapping[str, Stateful] | None = None,
        resume_from: str | PathLike[str] | None = None,
        keep: RetentionPolicy | None = None,
        strict: bool = True,
        signals: Sequence[str] = SIGNALS,
        on_preempt: OnPreempt = "raise",
        time_limit: GivenLimit | None = None,
        on_save_failure: OnSaveFailure = "raise",
        on_world_size_change: OnWorldSizeChange = "error",
        mirror: str | PathLike[str] | Mirror | None = None,
        async_save: bool = True,
        elastic: bool = False,
    ) -> None:
        self._options = Options(
            patience=patience,
            min_delta=min_delta,
            monitor=monitor,
            mode=mode,
            early_stopping=early_stopping,
            objects={} if objects is None else objects,
            resume_from=resume_from,
            keep=keep,
            strict=strict,
            signals=signals,
            on_preempt=on_preempt,
            time_limit=time_limit,
            on_save_failure=on_save_failure,
            on_world_size_change=on_world_size_change,
            mirror=mirror,
            async_save=async_save,
            elastic=elastic,
        )
        self.early_stopping = early_stopping
        self.strict = strict
        self._state_as_given = early_stopping.state_dict() if early_stopping is not None else {}
        self._end: EndBySignal | None = None
        self._gate, self._repeats = LoadGuard(), Retries()
        self._parts: tuple[Component, ...] = ()
        self._seen: tuple[TrainingArguments, TrainerState, Path] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the same settings, and has been in no training."""
        unused = {"early_stopping": self._options.early_stopping, "_end": None, "_parts": (), "_seen": None}
        return {**vars(self), **unused}

    def __repr__(self) -> str:
        """What it was given, as it could be given again."""
        told = ", ".join(f"{name}={value!r}" for name, value in self._options.told().items())
        return f"LifecycleCallback({told})"

    def _repr_html_(self) -> str:
        """The run it is in, or was, as a notebook shows it: attempts, saves, the early-stopping curve, checkpoints."""
        from hf_lifecycle.views.run import training_page  # only a notebook asks for a picture

        if self._seen is None:
            return f"<pre>{escape(repr(self))}: in no training yet</pre>"
        args, state, place = self._seen
        settings = {} if self.early_stopping is None else self.early_stopping.settings
        metric = self._options.metric(args)
        return training_page(repr(self), place, state.log_history, metric, settings)

    @property
    def preempted(self) -> str | None:
        return None if self._end is None else self._end.ended_by

    def _decide_anew(self, args: TrainingArguments) -> EarlyStopping | None:
        """The decision as it is before any evaluation."""
        if self._options.early_stopping is not None:
            self._options.early_stopping.load_state_dict(self._state_as_given)
        else:
            self.early_stopping = self._options.decision(args)
        return self.early_stopping

    def _make_parts(self, args: TrainingArguments) -> Resume:
        given, ranks = self._options, Ranks.current()
        ranks.begin()
        nodes = Nodes.of(ranks, writes=args.should_save)
        position = Position()
        stopping = Stopping(self._decide_anew(args), given.monitor, ranks)
        randomness = Randomness(position, elastic=given.elastic)
        data, stream = DataState(position, randomness, given.objects), StreamPlace(position, randomness)
        losses, merging = LossAccumulator(position), AdapterMerging()
        weights = Weights(ranks, position, merging)
        schedule = Schedule(self._gate.take_schedule())
        assert args.output_dir is not None
        failures = FailurePolicy(given.on_save_failure)
        directory = RunDirectory(
            args.output_dir,
            ranks,
            nodes=nodes,
            keep=given.retention(args),
            mirror=given.second_place,
            failures=failures,
            tells=nodes.leads if nodes.several else args.process_index == 0,
        )
        journal = Journal(directory, self.early_stopping, given.metric(args))
        background = Background(given.async_save, weights, directory, ranks, Unresumable(given.objects))
        outside = Outside(given.objects, background, position)
        attributes = Attributes(given.objects, position, randomness, outside, self._repeats)
        due = PendingEvents(position, randomness, attributes, weights.moment)
        after_save = AfterSave(attributes, merging)
        staging = Staging(directory, journal, given.monitor, background, ranks)
        self._end = EndBySignal(signals_named(given.signals), given.on_preempt, directory, given.limit)
        preemption = Preemption(self._end, stopping=stopping, staging=staging, failures=failures, journal=journal)
        trained = (losses, weights, schedule, outside, attributes, merging)
        stateful = (position, stopping, due, randomness, data, stream, *trained, after_save)
        checkpoints = Checkpoints(stateful, given.objects, data, staging, ranks)
        # The order in which events are heard: where training is; whether it stops; what a resumed run does first; when
        # a signal ends it; where saves go; then the generators, which are captured last and restored first; what data
        # objects are like, and where a stream is; what was logged; the proof; the files; the events.
        first = (position, stopping, due, preemption, staging, background)
        others = (*first, randomness, data, stream, *trained, after_save, checkpoints, journal)
        self._parts = (StepEvents(others), *others)
        restored = (position, stopping, due, randomness, data, stream, weights, schedule, outside, checkpoints)
        return Resume(*restored, ranks, given, self.strict)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        put_back_left_over()
        give_back(args)  # a training with these arguments may have been interrupted
        recover_output_dir(args, Ranks.current())
        self._gate.attach("__init__", self)
        return control

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if callbacks_like(self) > 1:
            raise ValueError("callbacks has more than one LifecycleCallback; pass one, with all arguments")
        report_missing_names()
        self._release(args)  # an earlier train() may have raised
        self._seen = args, state, Path(os.path.abspath(str(args.output_dir)))
        self._gate.attach(LOOP, self)
        self._gate.close(args, self._options.resume_from)
        resume = self._make_parts(args)
        try:
            resume.begin(args, state, kwargs)
            return self._tell("on_train_begin", args, state, control, kwargs)
        except BaseException:
            self._release(args)
            raise

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        try:
            self._tell("on_train_end", args, state, control, kwargs)
        finally:
            self._release(args)
        if self._end is not None:
            self._end.deliver()  # does not return where the signal ends the process
        return control

    def _release(self, args: TrainingArguments) -> None:
        for part in self._parts:
            part.release(args)
        give_back(args)

    def _tell(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, kwargs: dict[str, Any]
    ) -> TrainerControl:
        told = Event(args, state, control, kwargs)
        for part in self._parts:
            if (hear := getattr(part, event, None)) is not None:
                hear(told)
        return control


def _forward(event: str) -> Any:
    def method(
        self: LifecycleCallback, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self._tell(event, args, state, control, kwargs)

    method.__name__ = method.__qualname__ = event
    method.__doc__ = f"Forward ``{event}`` to the parts."
    return method


_EVENTS = "epoch_begin step_begin substep_end pre_optimizer_step step_end epoch_end log evaluate predict save"
for _event in (f"on_{_name}" for _name in _EVENTS.split()):
    setattr(LifecycleCallback, _event, _forward(_event))
