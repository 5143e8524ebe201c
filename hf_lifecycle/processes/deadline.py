"""The time by which a training has to be saved, and whether another step still fits before it.

A step is begun only if the slowest recent step, the slowest recent pause between steps (an evaluation, the work at an
epoch's end) and the slowest recent save fit before the limit together, with a margin. So the last one of a job is not
killed half-way, whatever a step costs.

Not promised: that a step which takes far longer than all before it fits. The clock of this machine is the measure.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from datetime import datetime, timedelta
from numbers import Real
from typing import Any, Literal

from hf_lifecycle.argument_checks import given

__all__ = ["END_VARIABLE", "Deadline", "GivenLimit", "TimeLimit"]

logger = logging.getLogger("hf_lifecycle")

END_VARIABLE = "HF_LIFECYCLE_END_TIME"  # for schedulers that set none: seconds since 1970, like SLURM's
_VARIABLES = (END_VARIABLE, "SLURM_JOB_END_TIME")
_MUST = 'seconds, a timedelta, a datetime or "auto"'

GivenLimit = float | timedelta | datetime | Literal["auto"]

_RECENT_STEPS, _RECENT_PAUSES = 100, 5
_MARGIN, _LEAST = 1.25, 5.0  # of what is needed, and seconds beside it
_UNKNOWN_SAVE = 60.0  # seconds for a save while none was measured, or a tenth of the limit where that is less


class TimeLimit:
    """When training has to be over, as the user gave it.

    Args:
        value: Seconds or a timedelta from the begin of training; a datetime (local time if it has no time zone); or
            ``"auto"``: what the scheduler says.

    Raises:
        TypeError: It is none of these.
        ValueError: It is not in the future, or ``"auto"`` finds a variable that is no time.
    """

    def __init__(self, value: GivenLimit) -> None:
        self._given = value
        self._seconds: float | None = None
        self._ends_at: float | None = None
        number: Any = value.total_seconds() if isinstance(value, timedelta) else value
        if isinstance(value, datetime):
            self._ends_at = value.timestamp()
            if self._ends_at <= time.time():
                raise ValueError(f"time_limit must be in the future, got {value.isoformat()}")
        elif isinstance(value, str):
            if value != "auto":
                raise ValueError(f"time_limit must be {_MUST}, got {given(value)}")
            self._ends_at = _end_by_scheduler(os.environ)
        elif isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"time_limit must be {_MUST}, got {given(value)}")
        elif not 0 < float(number) < math.inf:
            raise ValueError(f"time_limit must be more than 0 seconds, and finite, got {given(value)}")
        else:
            self._seconds = float(number)

    def __repr__(self) -> str:
        return repr(self._given)

    @classmethod
    def of(cls, value: Any) -> TimeLimit | None:
        """``value`` as one; None for None."""
        return value if value is None or isinstance(value, cls) else cls(value)

    def begin(self, *, lag: int = 0) -> Deadline | None:
        """Training begins; ``lag`` as for :class:`Deadline`. None where there is no limit."""
        now = time.time()
        ends_at = self._ends_at if self._seconds is None else now + self._seconds
        return None if ends_at is None else Deadline(ends_at, now, lag=lag)


class Deadline:
    """The limit of one training, and what its steps, pauses and saves have taken so far.

    Args:
        ends_at: The limit, in seconds since 1970.
        now: When training begins.
        lag: Steps that are made between the decision to end and the end.
    """

    def __init__(self, ends_at: float, now: float, *, lag: int = 0) -> None:
        self.ends_at = ends_at
        self._lag = lag
        self._last, self._step = now, -1
        self._first = 0.0  # the first step also starts what training needs; it counts while it is the only one
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._pauses: deque[float] = deque(maxlen=_RECENT_PAUSES)
        self._unknown_save = min(_UNKNOWN_SAVE, max(0.0, ends_at - now) / 10)

    def reached(self, step: int, now: float) -> None:
        """Note that training is at a boundary: after step ``step``, or after what followed it."""
        took, self._last = now - self._last, now
        if self._step < 0:
            self._first = took
        elif step == self._step:
            self._pauses.append(took)
        else:
            self._steps.append(took)
        self._step = step

    def need(self, slowest_save: float | None) -> float:
        """Seconds that one more step, with all that may follow it, and the save then take at most."""
        step = max(self._steps, default=self._first) * (1 + self._lag)
        save = self._unknown_save if slowest_save is None else slowest_save
        return (step + max(self._pauses, default=0.0) + save) * _MARGIN + _LEAST

    def is_due(self, step: int, slowest_save: float | None) -> bool:
        """Whether training has to end at this boundary."""
        now = time.time()
        self.reached(step, now)
        return self.ends_at - now < self.need(slowest_save)


def _end_by_scheduler(environment: Mapping[str, str]) -> float | None:
    """When the job ends; None where no scheduler says so, which the log does.

    ``SLURM_JOB_END_TIME``: https://slurm.schedmd.com/sbatch.html, output environment variables.
    """
    for name in _VARIABLES:
        if not (text := environment.get(name, "")):
            continue
        try:
            ends_at = float(text)
        except ValueError:
            ends_at = math.nan
        if not 0 < ends_at < math.inf:
            raise ValueError(f'time_limit="auto": {name}={text!r} is not a time in seconds since 1970')
        return ends_at
    if "SLURM_JOB_ID" in environment:
        said = 'time_limit="auto": SLURM_JOB_END_TIME is not set, so there is no limit; set %s in the job script'
        logger.warning(said, END_VARIABLE)
    else:
        logger.info('time_limit="auto": neither %s is set, so there is no limit', " nor ".join(_VARIABLES))
    return None
