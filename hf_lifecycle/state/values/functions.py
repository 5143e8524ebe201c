"""What a user's functions keep beside what they are called with: closures, defaults, attributes, variables of modules.

Promise: of the variables of modules, those that the function's code names are found, through helper functions, classes
and objects of the user's too; of a library's modules and classes, those that the code sets there. A name may stand as
text, as for ``setattr`` or ``globals()``. Not promised: what is looked up by a name that is made at run time.
"""

from __future__ import annotations

import functools
import queue
import random
import sys
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from contextvars import ContextVar
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_lifecycle.bytecode import names_in, operands_of, texts_in
from hf_lifecycle.libraries import is_of_user, lies_with_user
from hf_lifecycle.state.modules import kept_within_look

__all__ = [
    "Variable",
    "counters_of",
    "functions_in",
    "is_named_by_user",
    "named_variables",
    "numbers_of_program",
    "objects_named_by",
    "variables_of",
]

_NUMBERS = (
    *(np.ndarray, torch.Tensor),
    *(random.Random, np.random.Generator, np.random.RandomState, torch.Generator),
)
_KEEP = (
    *(bytearray, array, Iterator, MethodType, functools.partial, threading.local, ContextVar),
    *(queue.Queue, queue.SimpleQueue, weakref.ref, type(functools.lru_cache(int))),
    *(MutableMapping, MutableSequence, MutableSet, deque, SimpleNamespace),
    *(torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
    *_NUMBERS,
)
_DEEPEST = 4
_NAMED = "variables of "  # a module or a class, by its name, which is the same in every process
_SCALARS: frozenset[Any] = frozenset({bool, int, float, str, bytes, type(None)})


class Variable(NamedTuple):
    """Something that a function keeps.

    Attributes:
        name: Its name.
        value: What it is.
        holder: What holds it: a cell, the variables of a module, a class of a library, or the function itself.
        key: Its name there; its number among the defaults of a function.
        within: What :func:`named_variables` finds a module or a class by; else empty.
    """

    name: str
    value: Any
    holder: Any
    key: Any
    within: str = ""


def variables_of(function: FunctionType) -> Iterator[Variable]:
    """What ``function`` keeps from one call to the next."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if issubclass(type(value), (ModuleType, type)):
            yield from _of_namespace(function.__code__, name, value)
        if not issubclass(type(value), ModuleType):
            yield Variable(name, value, cell, name)
    for number, value in enumerate(function.__defaults__ or ()):
        yield Variable(f"defaults[{number}]", value, function, number)
    for name, value in (function.__kwdefaults__ or {}).items():
        yield Variable(f"defaults[{name}]", value, function.__kwdefaults__, name)
    for name, value in vars(function).items():
        yield Variable(name, value, function, name)
    if lies_with_user(str(function.__globals__.get("__name__"))):  # a wrapper has the __module__ of what it wraps
        yield from _of_modules(function.__code__, function.__globals__)


def numbers_of_program() -> list[Variable]:
    """Generators, tensors and arrays that the code which has called this package holds in variables, and its functions.

    Its counters, lists and objects are not given: what they tell of is as often this process as the training.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "hf_lifecycle":
        frame = frame.f_back
    if frame is None or not lies_with_user(str(frame.f_globals.get("__name__"))):
        return []
    found = list(_of_modules(frame.f_code, frame.f_globals))
    if frame.f_locals is not frame.f_globals:
        held = {name: one for name, one in frame.f_locals.items() if issubclass(type(one), (*_NUMBERS, FunctionType))}
        found += [Variable(name, one, held, name) for name, one in sorted(held.items())]
    return [one for each in found for one in _reached(each, 0) if issubclass(type(one.value), _NUMBERS)]


def counters_of(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """Plain values in variables of modules and classes that what runs in ``frame`` sets, by their full names."""
    seen: set[int] = set()
    for one in _of_modules(frame.f_code, frame.f_globals):
        for each in _reached(one, 0, seen):
            if each.within and type(each.value) in _SCALARS:
                yield f"{each.within.removeprefix(_NAMED)}.{each.key}".removeprefix("__main__."), each.value


def _reached(variable: Variable, depth: int, seen: set[int] | None = None) -> Iterator[Variable]:
    """A variable, and those of the function that it holds; of the methods of a class too, if each is ``seen`` once."""
    yield variable
    value = variable.value
    if depth >= _DEEPEST or (seen is not None and id(value) in seen):
        return
    held = [value]
    if seen is not None:
        seen.add(id(value))
        held += [one for each in vars(value).values() for one in functions_in(each)] if type(value) is type else []
    for function in held:
        if issubclass(type(function), FunctionType):
            for one in variables_of(function):
                yield from _reached(one._replace(name=f"{variable.name}.{one.name}"), depth + 1, seen)


def _of_modules(code: CodeType, variables: dict[str, Any]) -> Iterator[Variable]:
    texts = texts_in(code)
    stored = operands_of(code, "STORE_GLOBAL") | texts
    if "modules" in names_in(code):  # sys.modules[__name__]
        stored |= operands_of(code, "STORE_ATTR")
    within = f"{_NAMED}{variables.get('__name__')}"
    for name in sorted((names_in(code) | texts) & variables.keys()):
        value = variables[name]
        if issubclass(type(value), ModuleType):
            yield from _of_namespace(code, name, value)
        elif name in stored or _keeps(value):
            yield Variable(name, value, variables, name, within)
        elif issubclass(type(value), type):
            yield from _of_namespace(code, name, value)
    for name in sorted(operands_of(code, "IMPORT_NAME") & sys.modules.keys()):
        yield from _of_namespace(code, name, sys.modules[name])


def _of_namespace(code: CodeType, name: str, space: Any, outer: tuple[Any, ...] = ()) -> Iterator[Variable]:
    """The variables of a user's module that the code names as its attributes; of a library's and its classes, sets."""
    is_users, is_class = is_of_user(space), issubclass(type(space), type)
    texts = texts_in(code)
    stored = operands_of(code, "STORE_ATTR") | texts
    if (is_users and is_class) or not (is_users or stored) or any(space is one for one in outer):
        return
    inside: Any = vars(space)
    own = f"{space.__module__}.{space.__qualname__}" if is_class else space.__name__
    for one in sorted((names_in(code) | texts) & inside.keys()):
        value, kind = inside[one], type(inside[one])
        keeps = _keeps(value)
        if issubclass(kind, ModuleType) or (issubclass(kind, type) and not keeps):
            yield from _of_namespace(code, f"{name}.{one}", value, (*outer, space))
        elif (keeps or one in stored) if is_users else (one in stored and (keeps or kind in _SCALARS)):
            yield Variable(f"{name}.{one}", value, space if is_class else inside, one, f"{_NAMED}{own}")


def named_variables(path: str, key: Any) -> Any:
    """The variables of a module that is imported, or a class in one, where code of the user's sets one called ``key``.

    Args:
        path: What :attr:`Variable.within` has been.
        key: The name of the variable.
    """
    name = path.removeprefix(_NAMED)
    if name == path or type(key) is not str or not is_named_by_user(key):
        return None
    module, _, kind = name.rpartition(".")
    if name in sys.modules:
        return vars(sys.modules[name])
    found = vars(sys.modules[module]).get(kind) if module in sys.modules else None
    return found if issubclass(type(found), type) else None


def objects_named_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Objects of libraries in variables of modules, on which ``function`` may set attributes; by their names."""
    code, variables = function.__code__, function.__globals__
    if lies_with_user(str(variables.get("__name__"))) and operands_of(code, "STORE_ATTR"):
        for name in sorted(names_in(code) & variables.keys()):
            kind = type(variables[name])
            if kind.__dictoffset__ and not issubclass(kind, (FunctionType, ModuleType, type)):
                yield name, variables[name]


def _keeps(value: Any) -> bool:
    """Whether a variable of a module can hold what changes, without being set anew."""
    kind = type(value)
    if issubclass(kind, _KEEP) or kind.__module__.partition(".")[0] == "pandas":
        return True
    return is_of_user(value if issubclass(kind, (FunctionType, type)) else kind)


@kept_within_look
def is_named_by_user(attribute: str) -> bool:
    """Whether code of a user's sets an attribute of this name, or has the name as text, as for ``setattr``.

    Looked at is what is called at this moment, and the functions and classes in the user's modules.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if lies_with_user(str(frame.f_globals.get("__name__"))) and _sets(frame.f_code, attribute):
            return True
        frame = frame.f_back
    return _is_named_in_modules(attribute, len(sys.modules), len(vars(sys.modules.get("__main__", sys))))


@functools.cache
def _is_named_in_modules(attribute: str, *counts: int) -> bool:
    return any(_sets(code, attribute) for code in _codes_in_modules(*counts).get(attribute, ()))


@functools.lru_cache(maxsize=1)
def _codes_in_modules(*_: int) -> dict[str, list[CodeType]]:
    """The code in which a name or a text is; made once for as many modules as there are now."""
    modules = [module for name, module in list(sys.modules.items()) if lies_with_user(name)]
    held = [one for module in modules for one in list(vars(module).values())]
    kinds = [one for one in held if issubclass(type(one), type) and is_of_user(one)]
    own = [one for kind in kinds for one in list(vars(kind).values())]
    found: dict[str, list[CodeType]] = {}
    codes = [function.__code__ for one in (*held, *own) for function in functions_in(one)]
    queue = list({id(one): one for one in codes}.values())
    for code in queue:
        queue += [one for one in code.co_consts if type(one) is CodeType]
        for name in {*code.co_names, *(one for one in code.co_consts if type(one) is str)}:
            found.setdefault(name, []).append(code)
    return found


def functions_in(one: Any) -> list[FunctionType]:
    """A function, or those of a method of a class; nothing else is asked, whose attributes may be anything."""
    kind = type(one)
    if kind in (classmethod, staticmethod):
        one = one.__func__
    parts = (one.fget, one.fset) if kind is property else (one,)
    return [each for each in parts if type(each) is FunctionType]


@functools.cache
def _sets(code: CodeType, attribute: str) -> bool:
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    if attribute in code.co_consts or (attribute in code.co_names and attribute in operands_of(code, "STORE_ATTR")):
        return True
    return any(_sets(one, attribute) for one in inner)
