"""Counters, lists and other plain values in variables of the program start again in a resumed run, and are named.

What they tell of may be this process alone, so they are not restored. Promise: where a run that was resumed begins to
train, those that begin with another value than they had at the save are named in one warning, with both values. Quiet
is what the program has set as it was, what never changed, and what it read from a clock. Environment variables that
the program sets and counters in variables of modules are among them. Iterators that the program goes through beside the
manager's are named at the first save, and ``enumerate`` around batches where it starts again.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

from hf_lifecycle.hosts.accelerate.iteration.iterators import enumerates_batches, iterators_beside
from hf_lifecycle.messages import few
from hf_lifecycle.state.values.functions import is_named_by_user
from hf_lifecycle.state.values.marks import Clocks
from hf_lifecycle.state.values.variables import values_of_program

__all__ = ["ProgramVariables"]

logger = logging.getLogger("hf_lifecycle")

_OF_PROCESS = "environment variable "
_LONGEST = 60  # letters of a value


class ProgramVariables:
    """Of one run.

    Args:
        known: Gives what others carry or name.
        batches: The code of the manager's iterators.
    """

    def __init__(self, known: Callable[[], Iterable[Any]], batches: CodeType) -> None:
        self._known = known
        self._batches = batches
        self._has_saved = False
        self._clocks = Clocks()
        self._first: dict[str, str] = {}  # as the run, or its first pass, began
        self._lasting: set[str] = set()  # those that were there before the epochs, or the first pass without any
        self._saved: Mapping[str, str] = {}
        self._to_tell = False  # of what was loaded
        self._has_begun = False

    def begin_run(self) -> None:
        """The loop over epochs is about to begin."""
        new = self._values()
        self._lasting |= new.keys() - self._first.keys()
        self._first = {**new, **self._first}

    def begin_pass(self, inside: bool) -> None:
        """A pass is about to begin, or (``inside``) the rest of one."""
        if self._has_begun and not self._to_tell:
            return
        now = self._values()
        self._first = {**now, **self._first}
        self._has_begun = True
        if self._to_tell:
            self._to_tell = False
            self._tell({name: text for name, text in now.items() if inside or name in self._lasting})
            sentence = enumerates_batches() if inside else None
            if sentence is not None:
                logger.warning("maybe not exact: %s", sentence)

    def _tell(self, now: Mapping[str, str]) -> None:
        other = [name for name in sorted(self._saved) if now.get(name, self._saved[name]) != self._saved[name]]
        if other:
            logger.warning(
                "maybe not exact: variables of your program have other values than at the save: %s; if training "
                "depends on them, keep them in an object that you pass as objects=, or use manager.progress",
                few([f"{name} ({_change(self._saved[name], now[name])})" for name in other]),
            )

    def state_dict(self) -> dict[str, str]:
        """Those that have changed, in an earlier process too."""
        if not self._has_saved:
            self._has_saved = True
            for sentence in iterators_beside(self._batches):
                logger.warning("maybe not exact: %s", sentence)
        now = self._values(self._first)
        changed = {
            name: text for name, text in now.items() if name in self._saved or text != self._first.get(name, "None")
        }
        of_others = [one for one in changed if one.startswith(_OF_PROCESS)]
        left = {one for one in of_others if not is_named_by_user(one.removeprefix(_OF_PROCESS))}
        return {name: text for name, text in changed.items() if name not in left}

    def load_state_dict(self, saved: Mapping[str, str]) -> None:
        """Compare with ``saved`` when the next pass begins."""
        self._saved, self._to_tell = dict(saved), True

    def _values(self, wanted: Mapping[str, str] | None = None) -> dict[str, str]:
        passed = {id(one) for one in self._known()}
        found = values_of_program(passed, wanted, lambda value: type(value) is float and self._clocks.gave(value))
        before = [one for one in (*self._first, *self._saved) if one.startswith(_OF_PROCESS)]
        names = {*before, *(f"{_OF_PROCESS}{one}" for one in os.environ)}
        return found | {name: repr(os.environ.get(name.removeprefix(_OF_PROCESS)))[:_LONGEST] for name in sorted(names)}


def _change(was: str, now: str) -> str:
    """What became of a value, in words; digests of its content are left out."""
    before, after = (re.sub(r" [0-9a-f]{8}$", "", text) for text in (was, now))
    return f"{after} with other values" if before == after else f"was {before}, is {after}"
