"""What a loop is trained with beside its state, compared with what it was when the run began.

The settings of optimizers and schedulers; the rows, classes, values and code of what makes batches; the numbers and the
code of models; the code of schedules, of the user's objects, of the loop's body and of what that calls.

Promise: each thing is looked at once in a process, in ``resume()`` or before the loop that it is prepared for begins; a
save looks at none. What a program may set between these two places is compared only where it is told apart from an
edit. Loaders that are prepared within an epoch may have other data in each, and are not compared. Not seen: settings
and numbers of what engines hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

from hf_lifecycle.data.made_of import made_of, other_parts, other_rows
from hf_lifecycle.engine.made_with import (
    constructed_with,
    in_effect,
    settings_of,
    settings_of_schedule,
    unlike_settings,
)
from hf_lifecycle.hosts.accelerate.intercept import loaders_of
from hf_lifecycle.hosts.accelerate.prepared import Prepared
from hf_lifecycle.state.alive import attached
from hf_lifecycle.state.environment import Difference
from hf_lifecycle.state.loop_code import asking_frame, code_of_loop
from hf_lifecycle.state.modules import modules_of
from hf_lifecycle.state.program import code_of, edited, numbers_of, other_model, told_of_edits, told_of_model

__all__ = ["Program"]

logger = logging.getLogger("hf_lifecycle")

_Entry = Mapping[str, Any]
_SET_LATER = ("numbers", "values")  # what a program may set between resume() and its loop


class Program:
    """Follows what one run was begun with.

    Attributes:
        begun: What each thing was, by its name, as the run was begun.
        plain_loaders: The loaders that were not prepared.
    """

    def __init__(self, accelerator: Any, prepared: Prepared) -> None:
        self.begun: dict[str, _Entry] = {}
        self.plain_loaders = prepared.plain
        self._accelerator = accelerator
        self._prepared = prepared
        self._beside: dict[str, Any] | None = None  # schedules that are not prepared, at the first look
        self._present: dict[str, _Entry] = {}  # in this process
        self._saved: Mapping[str, _Entry] = {}  # of the run that is continued
        self._unsettled: Mapping[str, _Entry] = {}  # of that, what was looked at before its loop, and not in resume()
        self._loops: set[CodeType] = set()  # functions whose loops were looked at
        self._carried: Collection[str] = ()  # paths of what training changed, which is restored

    def begin(self, *, in_loop: bool) -> None:
        """A loop is about to begin, or ``resume()``: look at what has been prepared for it."""
        self._look(in_loop=in_loop)
        problems, doubts = self._compared(self._new())
        if in_loop and self._unsettled:
            unsettled, self._unsettled = self._unsettled, {}
            things = dict(self._things())
            now = {name: _look_at(*things[name], as_made=False) for name in unsettled if name in things}
            again = {name: _changed_twice(unsettled[name], self._present[name], one) for name, one in now.items()}
            told = self._unlike_values(unsettled, again)
            problems, doubts = problems + told[0], doubts + told[1]
        for problem in problems:
            logger.warning("not exact: %s", problem)
        for doubt in doubts:
            logger.warning("maybe not exact: %s", doubt)

    def ask(self, loader: Any) -> None:
        """The loop goes through this loader, which may not be prepared."""
        self.plain_loaders.ask(loader)
        self._new()

    def begin_pass(self, _: bool) -> None:
        """A pass is about to begin: look at the loop that asks for it, and at what that calls."""
        frame = asking_frame()
        if frame is None or frame.f_code in self._loops:
            return
        self._loops.add(frame.f_code)
        found, module = code_of_loop(frame), frame.f_globals.get("__name__")
        function = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        name = f"loop: {module}.{function}"
        if found is None or name in self.begun:
            return
        asking, saved = found.pop("asking"), self._saved.get(name)
        self.begun[name] = found if saved is None else saved
        if saved is not None and saved["python"] == found["python"]:
            is_edited = asking and saved["bodies"] and asking not in saved["bodies"]
            other = [f"the body of the loop in {function}"] if is_edited else []
            for doubt in told_of_edits([*other, *edited(saved["code"], found["code"])]):
                logger.warning("maybe not exact: %s", doubt)

    def loaded(self, saved: Mapping[str, _Entry], attributes: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """A run that was begun with ``saved`` is about to be continued; what is prepared later is compared then.

        Args:
            attributes: What is restored of what training changed.

        Returns:
            A sentence for each thing that makes the resume inexact, and for each that may do so.
        """
        self._look(in_loop=False)
        self._saved, self.begun = saved, {}
        self._loops.clear()
        self._carried = {*attributes["values"], *attributes["data"]}
        known = self._new()
        problems, doubts = self._compared(known)
        alike = {name: one for name, one in known.items() if _is_in_loop(one) == _is_in_loop(self._present[name])}
        told = self._unlike_values(alike, self._present)
        self._unsettled = {name: one for name, one in known.items() if _is_in_loop(one) and name not in alike}
        return problems + told[0], doubts + told[1]

    def applied(self) -> tuple[list[Difference], list[str]]:
        """The state is loaded. Returns the settings that this has undone, and a sentence for each of the others."""
        undone, other = [], []
        for name, (kind, one) in self._things():
            saved, present = (each.get(name, {}).get("settings") for each in (self._saved, self._present))
            if saved is not None and present is not None:
                found = unlike_settings(saved, present, _SETTINGS[kind](one), name)
                undone += found[0]
                other += found[1]
        return undone, other

    def _look(self, *, in_loop: bool) -> None:
        """At what was not looked at yet."""
        are_new = not any(getattr(one, "state", None) for one in self._prepared.optimizers().values())
        things = dict(self._things())
        schedules = [one for kind, one in things.values() if kind == "schedule"]
        for name, (kind, one) in things.items():
            if name not in self._present:
                # A schedule steps with training only; a program may set what an optimizer has before its loop.
                as_made = are_new and not (in_loop and kind == "optimizer")
                own = schedules if kind == "optimizer" else []
                self._present[name] = {**_look_at(kind, one, as_made=as_made, schedules=own), "in_loop": in_loop}

    def _things(self) -> Iterator[tuple[str, tuple[str, Any]]]:
        """What there is, by name, and of which kind."""
        prepared = self._prepared
        yield from ((f"loader {number}", ("loader", one)) for number, one in enumerate(loaders_of(self._accelerator)))
        yield from ((name, ("loader", one)) for name, one in self.plain_loaders.all().items())
        yield from ((name, ("model", one)) for name, one in prepared.models().items())
        yield from ((name, ("optimizer", one)) for name, one in prepared.optimizers().items())
        if self._beside is None:
            self._beside, _ = attached({}, prepared.names_of_optimizers(), prepared.known())
        yield from ((name, ("schedule", one)) for name, one in {**prepared.schedulers(), **self._beside}.items())
        yield from ((f"objects: {name}", ("object", one)) for name, one in prepared.objects().items())

    def _new(self) -> dict[str, _Entry]:
        """Let what is not known of this run yet be known, as it was saved or as it is. Returns what was saved of it."""
        unasked = self.plain_loaders.all().keys() - self.plain_loaders.asked().keys() - self._saved.keys()
        new = {name: one for name, one in self._present.items() if name not in {*self.begun, *unasked}}
        known = {name: one for name, one in self._saved.items() if name in new}
        self.begun |= new
        for name, one in known.items():
            settings = (
                {"settings": in_effect(one["settings"], new[name].get("settings", {}))} if "settings" in one else {}
            )
            self.begun[name] = {**one, **settings}
        return known

    def _compared(self, known: Mapping[str, _Entry]) -> tuple[list[str], list[str]]:
        """Sentences on what a program does not set between ``resume()`` and its loop."""
        both = [(one.get("code", {}), self._present[name].get("code", {})) for name, one in known.items()]
        code = told_of_edits(name for saved, present in both for name in edited(saved, present))
        return other_rows(self._not_carried(known), self._present) + code, other_parts(known, self._present)

    def _unlike_values(self, saved: Mapping[str, _Entry], present: Mapping[str, _Entry]) -> tuple[list[str], list[str]]:
        """Sentences on the rest."""
        own = self._not_carried(saved)
        numbers = [
            f"{name}.{told}"
            for name, one in own.items()
            if "numbers" in one and "numbers" in present.get(name, {})
            for key, told in other_model(one["numbers"], present[name]["numbers"]).items()
            if f"{name}.{key}" not in self._carried
        ]
        return told_of_model(numbers), other_parts(own, present, "values")

    def _not_carried(self, known: Mapping[str, _Entry]) -> Mapping[str, _Entry]:
        """Without the rows and values that training has changed and that are restored."""
        found: dict[str, dict[str, Any]] = {}
        for name, one in known.items():
            found[name] = dict(one)
            for kind, within in (("rows", "dataset."), ("values", "")):
                held = one.get(kind, {}).items()
                kept = {key: each for key, each in held if f"{name}.{within}{key}" not in self._carried}
                found[name] |= {kind: kept}
        return found


def _is_in_loop(entry: _Entry) -> bool:
    return bool(entry.get("in_loop", False))  # checkpoints of before do not tell


def _changed_twice(saved: _Entry, first: _Entry, now: _Entry) -> dict[str, dict[str, str]]:
    """What is there now, but as it was saved where it was so at first: the program has not set it in between."""
    return {
        kind: {key: one for key, one in saved[kind].items() if first[kind].get(key) == one}
        | {key: one for key, one in now[kind].items() if first[kind].get(key) != saved[kind].get(key)}
        for kind in _SET_LATER
        if kind in saved and kind in first
    }


def _look_at(kind: str, one: Any, *, as_made: bool, schedules: Sequence[Any] = ()) -> dict[str, Any]:
    """What something is.

    Args:
        as_made: Whether its settings are those that it was made with, all of them.
        schedules: Of an optimizer, those that may be its own.
    """
    if kind == "loader":
        return made_of(one)
    if kind == "model":
        return {"numbers": numbers_of(one), "code": code_of(module for _, module in modules_of(one))}
    if kind == "object":
        return {"code": code_of([one])}
    settings = _SETTINGS[kind](one)
    code = code_of([one, *getattr(one, "lr_lambdas", ())])
    of_schedules = schedules if kind == "optimizer" else [one]
    return {"settings": settings if as_made else constructed_with(one, settings, of_schedules), "code": code}


_SETTINGS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "optimizer": lambda one: settings_of(one.param_groups),
    "schedule": settings_of_schedule,
}
