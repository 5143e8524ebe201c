"""What training changes among plain values and flags: told from what was there at first, copied, and put back.

Promise: a value that differs from what it was at first, or that did in an earlier process of the run, is in what is
saved; what was read from a clock since is not, which means nothing in another process. Where to look, and when, is the
host's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hf_lifecycle.messages import few
from hf_lifecycle.state.attributes import Look, Place
from hf_lifecycle.state.values import NotPlain, copied, given_back

__all__ = ["ChangedFlags", "ChangedValues", "Clocks", "begins_anew", "is_changed", "made_ahead"]

_CLOCKS = (time.time, time.monotonic, time.perf_counter, time.process_time)


class Clocks:
    """Tells numbers that were read from a clock since this was made."""

    def __init__(self) -> None:
        self._began = tuple(clock() for clock in _CLOCKS)

    def gave(self, value: Any) -> bool:
        """Whether ``value`` is such a number."""
        if type(value) is not float:
            return False
        return any(began <= value <= clock() for clock, began in zip(_CLOCKS, self._began, strict=True))


class ChangedValues:
    """Plain values by their path.

    Args:
        look: Finds them.
        tell: Told, once for each path, in a sentence, what changes and is not saved.

    Attributes:
        known: The paths of those that were changed, in an earlier process too.
        places: Where these were last seen.
    """

    def __init__(self, look: Callable[[], Look], tell: Callable[[str, str], None]) -> None:
        self._look = look
        self._tell = tell
        self.known: set[str] = set()
        self._first: dict[str, Any] | None = None
        self._at_begin: dict[str, Any] = {}  # the marks when the loop began, where that is later
        self._late: set[str] = set()  # that were changed after that
        self.places: dict[str, Place] = {}
        self._clocks = Clocks()

    @property
    def has_first(self) -> bool:
        return self._first is not None

    def take_first(self) -> None:
        """All values are as they are at first; those that are new since the last call."""
        self._first = {**self._look().marks, **(self._first or {})}

    def take_begin(self) -> None:
        """The loop begins: what differs already was set by the program before it."""
        self._at_begin = dict(self._look().marks)

    def notice(self) -> Look:
        """Look for what has changed. Returns what was seen."""
        assert self._first is not None
        seen = self._look()
        marks = seen.marks
        changed = {path for path, mark in marks.items() if is_changed(self._first, path, mark)}
        self.known |= {path for path in changed if not self._clocks.gave(marks[path])}
        since = self._at_begin or self._first
        self._late |= {path for path in self.known & marks.keys() if is_changed(since, path, marks[path])}
        self.places = {path: seen.places[path] for path in self.known & seen.places.keys()}
        return seen

    def state_dict(self, instead: Mapping[str, Any] | None = None, seen: Look | None = None) -> dict[str, Any]:
        """What has changed, by path.

        Args:
            instead: Copies to be saved in place of the values of now.
            seen: What :meth:`notice` has just returned.
        """
        places = (self.notice() if seen is None else seen).places
        paths = sorted(self.known & places.keys())
        return {path: one for path in paths for one in self._value(places[path], path, instead or {})}

    def _value(self, place: Place, path: str, instead: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            value = instead[path] if path in instead else copied(place.get())
        except NotPlain as why:
            self._tell(path, f"{path} changes while training runs, and a resumed run begins with it anew: {why}")
            return
        yield {"within": place.path, "key": place.key, "value": value, "late": path in self._late}

    def small_copies(self) -> dict[str, Any]:
        """Of what is known to change and is small, as it is now."""
        values = {}
        for path, place in self.places.items():
            try:
                values[path] = copied(place.get(), small=True)
            except (NotPlain, KeyError, IndexError, ValueError):
                continue
        return values

    def put_back(self, saved: Mapping[str, Any]) -> list[str]:
        """Set the values as they were saved. Returns the paths of those that have no place now."""
        seen, lost = self._look(), []
        for path, one in saved.items():
            place = seen.places.get(path) or seen.place(one["within"], one["key"])
            try:
                if place is None:
                    raise NotPlain("nothing is there now")
                place.put(given_back(_value_at(place), one["value"]))
                self.known.add(path)
                self._late |= {path} if one["late"] else set()
            except (NotPlain, AttributeError, TypeError, ValueError, KeyError, IndexError):
                lost.append(path)
        self.places = {path: seen.places[path] for path in self.known & seen.places.keys()}
        return lost

    def release(self) -> None:
        """Hold no object any more."""
        self._first, self._at_begin, self.places = None, {}, {}


class ChangedFlags:
    """One attribute, true or false, of many objects.

    Args:
        name: The attribute.
        owners: Gives the objects by name.
    """

    def __init__(self, name: str, owners: Callable[[], Mapping[str, Any]]) -> None:
        self._name = name
        self._owners = owners
        self._first: dict[str, bool] = {}
        self._known: set[str] = set()  # those that were seen to differ

    def take_first(self) -> None:
        """All flags are as they are at first; those that are new since the last call."""
        self._first = self._now() | self._first

    def notice(self) -> dict[str, bool]:
        """Look for what has changed. Returns all flags."""
        now = self._now()
        self._known |= {name for name, flag in now.items() if self._first.get(name, flag) != flag}
        return now

    def state_dict(self) -> dict[str, bool]:
        """Those that have changed."""
        return {name: flag for name, flag in self.notice().items() if name in self._known}

    def load_state_dict(self, saved: Mapping[str, bool]) -> None:
        """Set the flags as they were saved; a name that is gone is passed over."""
        owners = self._owners()
        for name in saved.keys() & owners.keys():
            self._known.add(name)
            setattr(owners[name], self._name, saved[name])

    def _now(self) -> dict[str, bool]:
        return {name: getattr(one, self._name) for name, one in self._owners().items()}


def is_changed(first: Mapping[str, Any], path: str, mark: Any) -> bool:
    """Whether a value, of which ``mark`` tells, is another than at first."""
    if path not in first or type(first[path]) is not type(mark):
        return True
    before = first[path]
    return bool(before != mark and (before == before or mark == mark))  # NaN is itself


def made_ahead(path: str) -> str:
    """A sentence that names a value of what makes batches, which may not be what the next batch was made with."""
    return (
        f"{path} changes while training runs, and batches are made ahead of it: if they depend on it, give its object "
        "state_dict() and load_state_dict()"
    )


def begins_anew(paths: Sequence[str]) -> str:
    """A sentence that names what :meth:`ChangedValues.put_back` has found no place for."""
    return (
        f"{len(paths)} values that had changed while training ran are not where they were, so a resumed run begins "
        f"with them anew: {few(paths)}"
    )


def _value_at(place: Place) -> Any:
    try:
        return place.get()
    except (KeyError, IndexError, ValueError):
        return None
