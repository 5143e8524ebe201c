"""When to stop training: a pure decision over the metrics of successive evaluations.

Promise: the same metrics give the same decision, whether or not the run was interrupted and resumed between any two of
them. Not done here: nothing is trained, saved or restored, and the caller chooses the metric.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any, Literal, SupportsFloat, get_args

from hf_lifecycle import early_stopping_replay
from hf_lifecycle.argument_checks import read_choice, read_finite, read_flag, read_number
from hf_lifecycle.early_stopping_record import Record, read_limit, read_position, read_state

__all__ = ["EarlyStopping"]

logger = logging.getLogger(__name__)

Mode = Literal["min", "max"]
DeltaMode = Literal["absolute", "relative"]
PatienceUnit = Literal["evaluations", "steps", "samples", "seconds"]
SharedBy = Callable[[SupportsFloat, "float | None"], "tuple[float, float | None]"]


class EarlyStopping:
    """Says when a metric has stopped improving.

    An evaluation *counts as an improvement* if it is better than the best one so far by strictly more than
    ``min_delta``; smaller gains add up until they count. ``NaN`` never counts. Training should stop when ``patience``
    has passed without an improvement, or when a threshold is crossed. A decision to stop is final.

    Args:
        patience: Stop when this many ``patience_unit`` have passed without an improvement; 0 stops at the first
            evaluation without one, ``None`` never stops for this reason. Compared with ``>=``, as Lightning, Keras,
            TorchTNT, Ignite and transformers do (Composer: ``>``).
        min_delta: The gain that an improvement has to exceed, >= 0. Strict, as in all six.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        min_delta_mode: ``"absolute"``: ``min_delta`` is in units of the metric. ``"relative"``: it is a fraction of the
            best, ``min_delta * abs(best)``, as TorchTNT's ``threshold_mode="rel"`` and Ignite's ``"rel"`` have it for
            metrics that are not negative.
        start_after: The number of evaluations to ignore at the start, as in Keras' ``start_from_epoch``: they set no
            best, cost no patience and cross no threshold.
        baseline: Until an evaluation beats this by more than ``min_delta``, none counts as an improvement (Keras), and
            there is no best yet (Keras would track one).
        stopping_threshold: Stop at once when the metric is better than this (strictly, as in Lightning and TorchTNT).
        divergence_threshold: Stop at once when the metric is worse than this (strictly, as there).
        check_finite: Stop at once at NaN or infinity (Lightning, TorchTNT). If False, NaN is no improvement.
        restore_best: Asks the training loop to restore the best weights at the end. Nothing here reads it.
        patience_unit: The unit of patience (Composer: epochs or batches). Units other than ``"evaluations"`` count
            from the ``progress`` of the best; before there is one, from the first evaluation, or from the last ignored
            one.

    Raises:
        ValueError: An argument is invalid; the message names it.

    Example:
        >>> stopping = EarlyStopping(patience=2, min_delta=0.01)
        >>> [stopping.step(loss) for loss in (0.9, 0.5, 0.495, 0.6)]
        [False, False, False, True]
        >>> stopping.best_metric, stopping.counter
        (0.5, 2)
        >>> stopping.reason
        'no improvement on the best, 0.5, by more than 0.01 in 2 evaluations'

        After an interruption it decides as it would have:

        >>> resumed = EarlyStopping(patience=2, min_delta=0.01)
        >>> resumed.load_state_dict(stopping.state_dict())
        >>> resumed.step(0.1)
        True
    """

    def __init__(
        self,
        patience: float | None = 5,
        min_delta: float = 0.0,
        mode: Mode = "min",
        *,
        min_delta_mode: DeltaMode = "absolute",
        start_after: int = 0,
        baseline: float | None = None,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_finite: bool = True,
        restore_best: bool = False,
        patience_unit: PatienceUnit = "evaluations",
    ) -> None:
        self.patience_unit: PatienceUnit = read_choice("patience_unit", patience_unit, get_args(PatienceUnit))
        whole = patience_unit != "seconds"
        self.patience = None if patience is None else read_finite("patience", patience, minimum=0, whole=whole)
        self.min_delta = read_finite("min_delta", min_delta, minimum=0)
        self.mode: Mode = read_choice("mode", mode, get_args(Mode))
        self.min_delta_mode: DeltaMode = read_choice("min_delta_mode", min_delta_mode, get_args(DeltaMode))
        self.start_after = int(read_finite("start_after", start_after, minimum=0, whole=True))
        self.baseline = read_limit("baseline", baseline)
        self.stopping_threshold = read_limit("stopping_threshold", stopping_threshold)
        self.divergence_threshold = read_limit("divergence_threshold", divergence_threshold)
        self.check_finite = read_flag("check_finite", check_finite)
        self.restore_best = read_flag("restore_best", restore_best)
        good, bad = self.stopping_threshold, self.divergence_threshold
        if good is not None and bad is not None and self._better(bad, good):
            raise ValueError(
                f"divergence_threshold must not be better than stopping_threshold, got {bad} and {good} with "
                f"mode={mode!r}: every metric would stop the run"
            )
        self.shared_by: SharedBy | None = None  # on several ranks: makes metric and progress one
        self._record = Record()
        self._elapsed, self._clock_read = 0.0, self._now()

    @property
    def settings(self) -> dict[str, Any]:
        """What the user chose, by argument name; :meth:`state_dict` holds what happened."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "shared_by"}

    @property
    def best_metric(self) -> float | None:
        """The best metric that counted as an improvement, None before there is one."""
        return self._record.best_metric

    @property
    def best_progress(self) -> float | None:
        """The progress at which :attr:`best_metric` was seen, None where that is not known."""
        return self._record.best_progress

    @property
    def counter(self) -> int:
        """How many evaluations in a row, up to now, were no improvement."""
        return self._record.counter

    @property
    def evaluations(self) -> int:
        """How many evaluations there were, those that were only watched included."""
        return self._record.evaluations

    @property
    def improved(self) -> bool:
        """Whether the last evaluation counted as an improvement."""
        return self._record.improved

    @property
    def should_stop(self) -> bool:
        """Whether training should stop. Goes back to False only in :meth:`load_state_dict`, under wider limits."""
        return self._record.should_stop

    @property
    def reason(self) -> str | None:
        """Why training should stop, None while it should not."""
        return self._record.reason

    @property
    def to_beat(self) -> float:
        """What the next evaluation has to be better than to count; infinite while any number would."""
        references = [value for value in (self.best_metric, self.baseline) if value is not None]
        if self.mode == "min":
            return min((value - self._delta(value) for value in references), default=math.inf)
        return max((value + self._delta(value) for value in references), default=-math.inf)

    def step(self, metric: SupportsFloat, *, progress: float | None = None) -> bool:
        """Take the metric of one more evaluation and say whether to stop now.

        Args:
            metric: A number, a NumPy scalar or a tensor of one element.
            progress: Where training is, in ``patience_unit``: optimizer steps, samples seen, seconds trained. Must be
                given for steps and samples. For seconds the default is the time that this object lived, in this
                process and those it was saved in. For evaluations it decides nothing and only sets
                :attr:`best_progress`; the default is their number.

        Raises:
            ValueError: ``metric`` is not a single number, or ``progress`` is missing or goes backwards. Nothing
                changed.
        """
        if self._record.should_stop:
            return True
        if self.shared_by is not None:
            metric, progress = self.shared_by(metric, progress)
        value, record = float(read_number("metric", metric)), self._record
        by_default = {"evaluations": record.evaluations + 1, "seconds": self.elapsed_seconds}.get(self.patience_unit)
        position = read_position(by_default if progress is None else progress, record.progress, self.patience_unit)
        self._record = self._decide(value, position)
        return self._record.should_stop

    def state_dict(self) -> dict[str, Any]:
        """What happened so far, as plain JSON values (NaN and infinity are floats)."""
        elapsed = self.elapsed_seconds if self.patience_unit == "seconds" else None
        return asdict(self._record) | {"progress_unit": self.patience_unit, "elapsed_seconds": elapsed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Every option stays as this object's constructor was given it.

        One that had stopped stays so only if they stop there too.
        A state of the original project, which has just ``best_metric``, ``counter`` and ``should_stop``, is taken too.
        Positions saved in another ``patience_unit`` are dropped: patience then runs from the next evaluation.

        Raises:
            StateMismatch: Keys are missing or unknown. Nothing changed.
            ValueError: A value is not what its key holds. Nothing changed.
        """
        # Invariant: nothing after this line can fail, so a state is taken whole or not at all.
        saved, elapsed = read_state(state, self.patience_unit)
        self._record = saved
        if saved.should_stop:
            self._record = self._decide_again(saved)
        if saved.should_stop and not self._record.should_stop:
            logger.info(
                "early stopping had ended the run (%s); with the settings given now, training continues", saved.reason
            )
        self._elapsed, self._clock_read = elapsed, self._now()

    @staticmethod
    def replay(
        history: str | PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        metric: str = "eval_loss",
        progress: str | None = None,
        **settings: Any,
    ) -> early_stopping_replay.Replay:
        """Say when these settings would have stopped a run that is over.

        Args:
            history: A ``log_history``, a ``trainer_state.json``, a checkpoint directory that holds one, or its
                parsed content.
            metric: The name of the metric in the log, with or without ``eval_``.
            progress: The column of the log that holds the position in ``patience_unit``; ``step`` by default. Must be
                given for samples and seconds, of which Trainer logs neither.
            **settings: The arguments of :class:`EarlyStopping`.

        Raises:
            MetricNotFound: No row has the metric; the error lists those there are.
            StateFileError: The file is not a trainer state.
            FileNotFoundError: There is no such file.
            ValueError: A setting or a row is not what it should be.
        """
        return early_stopping_replay.replay(
            history, metric=metric, progress=progress, stopping=EarlyStopping(**settings)
        )

    def __repr__(self) -> str:
        chosen = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"EarlyStopping({chosen})"

    def _better(self, value: float, than: float) -> bool:
        return value < than if self.mode == "min" else value > than

    def _delta(self, reference: float) -> float:
        if self.min_delta_mode == "absolute":
            return self.min_delta
        return self.min_delta * abs(reference) if math.isfinite(reference) else 0.0

    # A method, so that a subclass can bring a clock of its own.
    def _now(self) -> float:
        return time.monotonic()

    @property
    def elapsed_seconds(self) -> float:
        """How long this object lived, in this process and those it was saved in."""
        return self._elapsed + (self._now() - self._clock_read)

    def _decide(self, metric: float, progress: float | None) -> Record:
        past = self._record
        record = replace(past, evaluations=past.evaluations + 1, metric=metric, progress=progress, improved=False)
        if past.evaluations < self.start_after:
            return replace(record, waiting_since=progress)
        if past.waiting_since is None:
            record = replace(record, waiting_since=progress)
        if self._failure(metric) is None and self._better(metric, self.to_beat):
            record = replace(
                record, best_metric=metric, best_progress=progress, waiting_since=progress, counter=0, improved=True
            )
        else:
            record = replace(record, counter=past.counter + 1)
        return self._conclude(record)

    def _decide_again(self, record: Record) -> Record:
        """What the options of now make of the last evaluation of ``record``."""
        if record.metric is None or record.improved:
            return self._conclude(record)
        self._record = record.before_last()
        return self._decide(record.metric, record.progress)

    def _conclude(self, record: Record) -> Record:
        metric = record.metric
        crossed = None if metric is None else self._failure(metric) or self._success(metric)
        reason = crossed or self._exhaustion(record)
        return replace(record, reason=reason, should_stop=reason is not None)

    def _failure(self, metric: float) -> str | None:
        if self.check_finite and not math.isfinite(metric):
            return f"the metric is {metric}, which is not finite"
        bad = self.divergence_threshold
        if bad is not None and self._better(bad, metric):
            return f"the metric, {metric:.6g}, is worse than the divergence threshold, {bad:.6g}"
        return None

    def _success(self, metric: float) -> str | None:
        good = self.stopping_threshold
        if good is not None and self._better(metric, good):
            return f"the metric, {metric:.6g}, is better than the stopping threshold, {good:.6g}"
        return None

    def _exhaustion(self, record: Record) -> str | None:
        if self.patience is None or record.improved:
            return None
        has_passed = record.waited(self.patience_unit) >= self.patience
        return record.describe_wait(self.settings) if has_passed else None
