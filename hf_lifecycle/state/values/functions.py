"""What a user's functions keep beside what they are called with: closures, defaults, attributes, variables of modules.

Promise: of the variables of modules, those that the function's code names are found, through helper functions, classes
and objects of the user's too, and none of a library's. Not promised: what is looked up by a name that is made at run
time.
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
from collections.abc import Container, Iterator, MutableMapping, MutableSequence, MutableSet
from contextvars import ContextVar
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_lifecycle.bytecode import instructions
from hf_lifecycle.libraries import LIBRARIES, is_installed, library_of, root_of

__all__ = [
    "Variable",
    "functions_in",
    "globals_in",
    "is_named_by_user",
    "is_of_user",
    "lies_with_user",
    "names_in",
    "names_read_by",
    "names_stored_by",
    "names_stored_in",
    "names_stored_later_by",
    "numbers_of_program",
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
_NOT_OF_USER = LIBRARIES | {"peft", "trl"}  # though they may lie where a user's code does


class Variable(NamedTuple):
    """Something that a function keeps.

    Attributes:
        name: Its name.
        value: What it is.
        holder: What holds it: a cell, the variables of a module, or the function itself.
        key: Its name there; its number among the defaults of a function.
    """

    name: str
    value: Any
    holder: Any
    key: Any


def variables_of(function: FunctionType) -> Iterator[Variable]:
    """What ``function`` keeps from one call to the next."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if issubclass(type(value), ModuleType):
            yield from _of_module(function.__code__, name, value)
        else:
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
    return [one for each in found for one in _numbers_in(each, 0)]


def _numbers_in(variable: Variable, depth: int) -> Iterator[Variable]:
    if issubclass(type(variable.value), _NUMBERS):
        yield variable
    elif issubclass(type(variable.value), FunctionType) and depth < _DEEPEST:
        for one in variables_of(variable.value):
            yield from _numbers_in(one._replace(name=f"{variable.name}.{one.name}"), depth + 1)


def _of_modules(code: CodeType, variables: dict[str, Any]) -> Iterator[Variable]:
    stored = _operands(code, "STORE_GLOBAL")
    for name in sorted(names_in(code) & variables.keys()):
        value = variables[name]
        if issubclass(type(value), ModuleType):
            yield from _of_module(code, name, value)
        elif name in stored or _keeps(value):
            yield Variable(name, value, variables, name)


def _of_module(code: CodeType, name: str, module: ModuleType) -> Iterator[Variable]:
    """The variables of a user's module that the code names as its attributes."""
    if not is_of_user(module):
        return
    inside, stored = vars(module), _operands(code, "STORE_ATTR")
    for one in sorted(names_in(code) & inside.keys()):
        if one in stored or _keeps(inside[one]):
            yield Variable(f"{name}.{one}", inside[one], inside, one)


def _keeps(value: Any) -> bool:
    """Whether a variable of a module can hold what changes, without being set anew."""
    kind = type(value)
    if issubclass(kind, _KEEP) or kind.__module__.partition(".")[0] == "pandas":
        return True
    return is_of_user(value if issubclass(kind, (FunctionType, type)) else kind)


def is_of_user(one: Any) -> bool:
    """Whether a module, a class or a function is a user's own, by where it lies.

    A wrapper, which has the ``__module__`` of what it wraps, is also where its code lies.
    """
    if isinstance(one, FunctionType) and lies_with_user(str(one.__globals__.get("__name__"))):
        return True
    return lies_with_user(one.__name__ if isinstance(one, ModuleType) else str(one.__module__))


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
def _is_named_in_modules(attribute: str, *_: int) -> bool:
    """Asked once for as many modules as there are now."""
    modules = [module for name, module in list(sys.modules.items()) if lies_with_user(name)]
    held = [one for module in modules for one in list(vars(module).values())]
    kinds = [one for one in held if issubclass(type(one), type) and is_of_user(one)]
    own = [one for kind in kinds for one in list(vars(kind).values())]
    return any(_sets(function.__code__, attribute) for one in (*held, *own) for function in functions_in(one))


def functions_in(one: Any) -> list[FunctionType]:
    """A function, or those of a method of a class; nothing else is asked, whose attributes may be anything."""
    kind = type(one)
    if kind in (classmethod, staticmethod):
        one = one.__func__
    parts = (one.fget, one.fset) if kind is property else (one,)
    return [each for each in parts if type(each) is FunctionType]


def _sets(code: CodeType, attribute: str) -> bool:
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    if attribute in code.co_consts or (attribute in code.co_names and attribute in _operands(code, "STORE_ATTR")):
        return True
    return any(_sets(one, attribute) for one in inner)


@functools.cache
def lies_with_user(module: str) -> bool:
    """Whether a module, by its name, is a user's own."""
    if module == "__main__":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or root_of(module) == "hf_lifecycle":
        return False
    return library_of(module) not in _NOT_OF_USER and not is_installed(Path(file))


@functools.cache
def names_in(code: CodeType) -> frozenset[str]:
    """The names of variables of modules and of attributes in a function's code, and in that of those within it."""
    inner = (names_in(one) for one in code.co_consts if isinstance(one, CodeType))
    return frozenset(code.co_names).union(*inner)


def globals_in(code: CodeType) -> frozenset[str]:
    """The names of variables of its module that a function's code reads, and that of those within it."""
    return _operands(code, "LOAD_GLOBAL")


@functools.cache
def _operands(code: CodeType, operation: str) -> frozenset[str]:
    names = {str(one.argval) for one in instructions(code) if one.opname == operation}
    inner = (_operands(one, operation) for one in code.co_consts if isinstance(one, CodeType))
    return frozenset(names.union(*inner))


@functools.cache
def names_stored_by(kind: type) -> frozenset[str]:
    """The attributes that the methods of a class, without those of its bases, set on any object."""
    return _named_by(kind, "STORE_ATTR")


def names_stored_in(method: Any) -> frozenset[str]:
    """The attributes that one function or method sets on any object."""
    code = getattr(getattr(method, "__func__", method), "__code__", None)
    return _operands(code, "STORE_ATTR") if issubclass(type(code), CodeType) else frozenset()


@functools.cache
def names_stored_later_by(kind: type) -> frozenset[str]:
    """Those that it sets on any object that is made already."""
    return _named_by(kind, "STORE_ATTR", {"__init__"})


@functools.cache
def names_read_by(kind: type) -> frozenset[str]:
    """The attributes that they read of any object."""
    return _named_by(kind, "LOAD_ATTR")


def _named_by(kind: type, operation: str, without: Container[str] = ()) -> frozenset[str]:
    methods = [one for name, one in vars(kind).items() if name not in without]
    codes = [getattr(getattr(one, "__func__", one), "__code__", None) for one in methods]
    return frozenset().union(*(_operands(code, operation) for code in codes if code is not None))
