"""What training changes among plain values and flags: told from what was there at first, copied, and restored.

Promise: a value that differs from what it was at first, or that did in an earlier process of the run, is in what is
saved; what was read from a clock since is not, which means nothing in another process. Where to look, and when, is the
host's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from hf_lifecycle.messages import few, few_by_owner
from hf_lifecycle.state.values.attributes import Look
from hf_lifecycle.state.values.bindings import is_trained
from hf_lifecycle.state.values.marks import Clocks
from hf_lifecycle.state.values.places import Place, newly_shared
from hf_lifecycle.state.values.restoring import given_back
from hf_lifecycle.state.values.structures import Standing, TrainedWithin
from hf_lifecycle.state.values.trees import NotPlain, copied

__all__ = ["ChangedFlags", "ChangedValues", "begins_anew", "is_changed", "made_ahead"]

_NOTHING = object()


class ChangedValues:
    """Plain values by their path.

    Args:
        look: Finds them.
        tell: Told, once for each path, in a sentence, what changes and is not saved.
        of_data: Whether a path leads to what makes batches. Of that, plain values alone are saved, since batches are
            made ahead; what is made on first use, such as an open file, is left alone.
        holder: Gives what may get attributes and is not met in a look before it has some, by its path; else None.

    Attributes:
        known: The paths of those that were changed, in an earlier process too.
        places: Where these were last seen.
    """

    def __init__(
        self,
        look: Callable[[], Look],
        tell: Callable[[str, str], None],
        of_data: Callable[[str], bool] = lambda path: False,  # noqa: ARG005
        holder: Callable[[str], Any] = lambda path: None,  # noqa: ARG005
    ) -> None:
        self._holder = holder
        self._of_data = of_data
        self._look = look
        self._tell = tell
        self.known: set[str] = set()
        self._first: dict[str, Any] | None = None
        self._bound: dict[str, Any] = {}  # the marks of what is not plain, as at first
        self._holders: frozenset[str] = frozenset()  # what could hold others at first
        self._standing = Standing()  # what stood where at first
        self._lost: set[str] = set()  # the paths of what changes and cannot be saved
        self._at_begin: dict[str, Any] = {}  # the marks when the loop began, where that is later
        self._late: set[str] = set()  # that were changed after that
        self._unseen: set[str] = set()  # what could not be looked at yet, of which nothing can be told as at first
        self._shared: dict[str, str] = {}  # what held the same as which other place at first
        self._sharing: set[str] = set()  # what has had memory of what is trained from the begin
        self.places: dict[str, Place] = {}
        self._clocks = Clocks()

    def take_first(self) -> None:
        """All values are as they are at first; those that are new since the last call."""
        seen = self._look()
        self._unseen |= seen.failed
        self._sharing |= {path for path, place in seen.places.items() if seen.left.shares(_value_at(place))}
        self._first = self._new_in(seen.marks) | (self._first or {})
        self._bound = self._new_in(seen.bindings) | self._bound
        self._shared = {path: other for path, (_, other) in self._new_in(seen.shared).items()} | self._shared
        self._standing.add(self._new_in({**seen.holders, **seen.entered}))
        self._holders |= seen.holders.keys()

    def _new_in(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What is in nothing that could have held it at an earlier call: else it was made since."""
        return {path: one for path, one in found.items() if not self._holders.intersection(_above(path))}

    def take_begin(self) -> None:
        """The loop begins: what differs already was set by the program before it."""
        self._at_begin = dict(self._look().marks)

    def notice(self) -> Look:
        """Look for what has changed. Returns what was seen."""
        assert self._first is not None
        seen, first = self._look(), self._first
        self._take_late(seen)
        marks = seen.marks
        # Most marks are the very objects that were there at first; to ask more of each takes as long as the look.
        other = [path for path, mark in marks.items() if first.get(path, _NOTHING) is not mark]
        changed = {path for path in other if is_changed(first, path, marks[path])}
        self.known |= {path for path in changed if not self._clocks.gave(marks[path])}
        since = self._at_begin or self._first
        known = [path for path in self.known if path in marks]
        self._late |= {path for path in known if is_changed(since, path, marks[path])}
        self.places = {path: seen.places[path] for path in known}
        return seen

    def _take_late(self, seen: Look) -> None:
        """What could not be looked at before is now as it is at first."""
        late = self._unseen - seen.failed
        if late:
            self._unseen -= late
            for first, now in ((self._first, seen.marks), (self._bound, seen.bindings)):
                assert first is not None
                first |= {
                    path: one for path, one in now.items() if late & {"", path, *_above(path)} and path not in first
                }
            self._standing.add({**seen.holders, **seen.entered})
            self._holders |= seen.holders.keys()

    def state_dict(self, instead: Mapping[str, Any] | None = None, seen: Look | None = None) -> dict[str, Any]:
        """What has changed, by path.

        Args:
            instead: Copies to be saved instead of the values of now.
            seen: What :meth:`notice` has just returned.
        """
        seen = self.notice() if seen is None else seen
        bound = self._rebound(seen)
        paths = sorted(path for path in self.known & seen.marks.keys() if not _is_within(path, self._lost))
        values = {path: one for path in paths for one in self._value(seen, path, instead or {})}
        shared = newly_shared(seen.shared, self._shared, values | bound)
        return values | bound | {path: one for path, one in shared.items() if not self._of_data(path)}

    def _rebound(self, seen: Look) -> dict[str, Any]:
        """Where another object or function has come, or more of them; what cannot be saved of it is told."""
        values: dict[str, Any] = {}
        lost: list[str] = []
        for path in sorted(self._replaced(seen), key=len):
            if path in self._lost or _is_within(path, {*values, *self._lost}):
                continue
            place = seen.places[path]
            own = _value_at(place)
            try:
                if self._of_data(path):
                    raise NotPlain("data workers prepare batches in advance")
                value = self._standing.copied(own, seen.left)
            except TrainedWithin as why:  # somebody else tells of that; the plain values beside a module are carried
                self._lost |= {path} if why.is_whole or is_trained(own) else set()
            except NotPlain:
                self._lost.add(path)
                lost.append(f"{path} ({type(own).__qualname__})")
            else:
                values[path] = {"within": place.path, "key": place.key, "value": value, "late": True, "bound": True}
        if lost:
            self._tell(lost[0], cannot_be_saved(lost))
        return values

    def _replaced(self, seen: Look) -> Iterator[str]:
        for path, mark in seen.bindings.items():
            if path in self._bound:
                if self._bound[path] != mark:
                    yield path
            elif seen.places[path].path in self._holders and not self._of_data(path):
                yield path

    def _value(self, seen: Look, path: str, instead: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        place = seen.places[path]
        if path not in self._sharing and seen.left.shares(_value_at(place)):
            self._sharing.add(path)
            self._tell(path, shares_memory(path))
        try:
            value = instead[path] if path in instead else copied(place.get(), left=seen.left)
        except NotPlain as why:
            self._tell(
                path,
                (
                    f"{path} changes during training and is not saved, so a resumed run starts with its "
                    f"initial value: {why}"
                ),
            )
            return
        yield {"within": place.path, "key": place.key, "value": value, "late": path in self._late, "bound": False}

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
        lost: list[str] = []
        for bound in (True, False, None):  # first what others are in, and last what is in another place too
            seen = self._look()
            for path in sorted((path for path in saved if saved[path]["bound"] is bound), key=len):
                if not self._is_put_back(path, saved[path], seen):
                    lost.append(path)
        self.places = {path: seen.places[path] for path in self.known & seen.marks.keys()}
        return lost

    def _is_put_back(self, path: str, one: Mapping[str, Any], seen: Look) -> bool:
        place = seen.places.get(path) or seen.place(one["within"], one["key"])
        if place is None and (holder := self._holder(one["within"])) is not None:
            place = Place(holder, one["key"], one["within"])
        if place is None:
            return False
        try:
            make = self._standing.given_back if one["bound"] else given_back
            own = None if seen.is_shared(path) else _value_at(place)
            is_same = one["bound"] is None
            place.put(seen.places[one["value"]].get() if is_same else make(own, one["value"], seen.left))
        except (NotPlain, AttributeError, TypeError, ValueError, KeyError, IndexError, RuntimeError):
            return False
        if one["bound"] is False:
            self.known.add(path)
            self._late |= {path} if one["late"] else set()
        return True

    def release(self) -> None:
        """Hold no object any more."""
        self._first, self._at_begin, self.places = None, {}, {}
        self._bound, self._shared, self._standing = {}, {}, Standing()


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
        """Set the flags as they were saved; a name that is gone is skipped."""
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


def made_ahead(paths: Sequence[str]) -> str:
    """A sentence that names values of what makes batches, which may not be what the next batch was made with."""
    change, them, owners = ("changes", "it", "its object") if len(paths) == 1 else ("change", "these", "their objects")
    return (
        f"{few_by_owner(paths)} {change} during training, and batches are prepared in advance: if they depend on "
        f"{them}, give {owners} state_dict() and load_state_dict()"
    )


def shares_memory(path: str) -> str:
    """A sentence that names a value whose tensors change with each step, and in a resumed run do not."""
    return (
        f"{path} shares the memory of weights or of an optimizer's state, as what state_dict() gives and what "
        "load_state_dict() is given does, so it changes with each step, and a resumed run has a copy that does not: "
        "keep copy.deepcopy() of a state, and load one"
    )


def cannot_be_saved(names: Sequence[str]) -> str:
    """A sentence that names what changes and has no plain form."""
    return (
        f"{few(names)} change{('s' if len(names) == 1 else '')} during training and cannot be saved, so a resumed "
        "run starts with the initial state: keep it in plain values, or in an object with state_dict() and "
        "load_state_dict() that you pass as objects="
    )


def begins_anew(paths: Sequence[str]) -> str:
    """A sentence that names what :meth:`ChangedValues.put_back` has found no place for."""
    return (
        f"{len(paths)} saved values cannot be restored, since what held them does not exist now, so the run "
        f"continues with their initial values: {few_by_owner(paths)}"
    )


def _above(path: str) -> Iterator[str]:
    """The paths that lead to this one."""
    return (path[:end] for end, letter in enumerate(path) if letter in ".[")


def _is_within(path: str, others: Collection[str]) -> bool:
    return any(one in others for one in _above(path))


def _value_at(place: Place) -> Any:
    try:
        return place.get()
    except (KeyError, IndexError, ValueError):
        return None
