"""What optimizers and schedulers are made with: their settings, compared with those that the run began with.

Loading a state brings most settings back, so that changing them between two starts has no effect: the resumed run is
the one that was begun. The numbers in the functions of a schedule are in no state: changed, they make another run.

Not seen: settings in objects that a scheduler does not give with its state, but for its functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any

from hf_lifecycle.bytecode import names_in
from hf_lifecycle.state.environment import Difference, Grade
from hf_lifecycle.state.reachable import attributes_of
from hf_lifecycle.state.values.described import described, description, description_digest
from hf_lifecycle.state.values.functions import variables_of
from hf_lifecycle.state.values.trees import PLAIN_SCALARS

__all__ = [
    "constructed_with",
    "in_effect",
    "report_of_no_effect",
    "settings_of",
    "settings_of_schedule",
    "unlike_settings",
]

_MOST = 8  # different values of one setting that are kept as they are
_LONGEST = 200  # characters of a value that is kept as it is
_FUNCTIONS = "functions["
_OF_RATE = frozenset({"base_lrs", "_last_lr"})  # which is the optimizer's
_ARGUMENTS = {"_anneal_func_type": "anneal_strategy", "_milestones": "milestones"}  # what the constructor calls it
_MOVES = frozenset({"optimizer", "last_epoch"})  # of the arguments of a schedule, what is no setting, or moves


def settings_of(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of an optimizer's groups, by name: the value, or the different ones of several groups.

    Of learning rates, the one that a schedule begins with.
    """
    values: dict[str, list[Any]] = {}
    for group in groups:
        for name, value in {**_given_by_schedule(group), "lr": group.get("initial_lr", group["lr"])}.items():
            if name not in ("params", "initial_lr"):
                values.setdefault(name, []).append(described(value))
    return {name: _shortest(given) for name, given in values.items()}


def _given_by_schedule(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group in which the least learning rate of a OneCycleLR stands as the arguments that it was made from."""
    first, most, least = (group.get(name) for name in ("initial_lr", "max_lr", "min_lr"))
    if not (type(first) is type(most) is type(least) is float and first and least):
        return dict(group)
    factors = {"div_factor": _rounded(most / first), "final_div_factor": _rounded(first / least)}
    return {**{name: value for name, value in group.items() if name != "min_lr"}, **factors}


def _rounded(number: float) -> float:
    return float(f"{number:.10g}")


def _shortest(values: list[Any]) -> Any:
    different = [one for number, one in enumerate(values) if one not in values[:number][-_MOST:]]
    if len(different) > _MOST:
        return description_digest(values)
    return different[0] if len(different) == 1 else different


def settings_of_schedule(scheduler: Any) -> dict[str, Any]:
    """What a scheduler that has made no step was made with, by name; of its functions, the numbers that they keep.

    Empty where it has no state to give.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    try:
        state = inner.state_dict()
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError):
        return {}
    if not isinstance(state, Mapping):
        return {}
    return {
        name: one if len(description(one)) <= _LONGEST else description_digest(one)
        for name, one in (*_of_state(state, ""), *_of_functions(inner, ""))
    }


def _of_state(state: Mapping[str, Any], within: str) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if key == "_schedulers" and isinstance(value, list):  # that torch's run one after another
            for number, one in enumerate(value):
                yield from _of_state(one, f"{within}schedulers[{number}].")
        elif key == "_schedule_phases":  # of a OneCycleLR
            yield f"{within}three_phase", len(value) == 3
            yield f"{within}pct_start", _rounded((value[0]["end_step"] + 1) / state["total_steps"])
        elif key not in _OF_RATE and key != "lr_lambdas":
            yield f"{within}{_ARGUMENTS.get(key, key)}", described(value)


def _of_functions(scheduler: Any, within: str) -> Iterator[tuple[str, Any]]:
    held = attributes_of(scheduler)
    for number, one in enumerate(held.get("_schedulers", ())):
        yield from _of_functions(one, f"{within}schedulers[{number}].")
    functions = {id(one): one for each in held.values() for one in (each if type(each) is list else [each])}
    for number, function in enumerate(one for one in functions.values() if type(one) in (partial, FunctionType)):
        for name, value in _numbers_of(function).items():
            yield f"{within}{_FUNCTIONS}{number}].{name}", described(value)


def _numbers_of(function: Any) -> dict[str, Any]:
    if type(function) is partial:
        given = {str(number): one for number, one in enumerate(function.args)} | function.keywords
        inner = _numbers_of(function.func) if type(function.func) in (partial, FunctionType) else {}
        return {**inner, **{name: one for name, one in given.items() if type(one) in PLAIN_SCALARS}}
    spaces = function.__globals__
    kept = {one.name: one.value for one in variables_of(function)}
    kept |= {name: spaces[name] for name in names_in(function.__code__) if name in spaces}
    return {name: one for name, one in sorted(kept.items()) if type(one) in PLAIN_SCALARS}


def constructed_with(one: Any, settings: Mapping[str, Any], schedules: Iterable[Any]) -> dict[str, Any]:
    """Of the settings of an optimizer or a schedule, those that are as constructors were given them.

    Left out is what the program, or training, may have set since.

    Args:
        schedules: Those whose arguments may stand in it: of an optimizer, all of its own; of a schedule, itself.
    """
    every = {type(each) for schedule in schedules for each in _every_schedule(schedule)}
    given = {name for kind in every for name in inspect.signature(kind).parameters} - _MOVES
    defaults = getattr(one, "defaults", {})
    return {
        name: value
        for name, value in settings.items()
        if name.rpartition(".")[2] in given or (name in defaults and described(defaults[name]) == value)
    }


def _every_schedule(scheduler: Any) -> Iterator[Any]:
    """It, and those that it runs one after another."""
    yield scheduler
    for one in attributes_of(scheduler).get("_schedulers", ()):
        yield from _every_schedule(one)


def in_effect(saved: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resumed run: what the checkpoint restores, with the numbers of the present functions."""
    return {**saved, **{name: one for name, one in present.items() if _FUNCTIONS in name}}


def unlike_settings(
    saved: Mapping[str, Any], present: Mapping[str, Any], loaded: Mapping[str, Any], of: str
) -> tuple[list[Difference], list[str]]:
    """What something was made with and is made with now.

    Args:
        loaded: Its settings after loading.
        of: Its name.

    Returns:
        What loading has undone, and a sentence for each of the others.
    """
    undone, other = [], []
    for name, value in saved.items():
        if name not in present or present[name] == value:
            continue
        if loaded.get(name, present[name]) != present[name]:
            undone.append(Difference(f"{name} of {of}", value, present[name], Grade.NO_EFFECT))
        else:
            other.append(f"{name} of {of} was {value!r} when the run started, and is {present[name]!r} now")
    return undone, other


def report_of_no_effect(differences: Iterable[Difference], way_on: str, *, is_exact: bool) -> str | None:
    """What to tell of those that have no effect; None where there is none.

    Args:
        way_on: When the new values can be set.
        is_exact: Whether nothing else is in the way of an exact resume.
    """
    told = [f"{one.name} {one.saved!r} -> {one.present!r}" for one in differences if one.grade is Grade.NO_EFFECT]
    if not told:
        return None
    exact = ", and the resume stays exact" if is_exact else ""
    return (
        f"no effect: {', '.join(told)}: the checkpoint restores the old values, as without this package{exact}. "
        "To train with the new values, start a new run from these weights, or set them in optimizer.param_groups (a "
        f"learning rate also as initial_lr and in lr_scheduler.base_lrs) or in the scheduler {way_on}"
    )
