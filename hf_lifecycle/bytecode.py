"""The instructions of a function's code, alike in every version of Python, and the names in it.

Promise: each instruction loads or stores one variable. Newer versions have some that do two of these at once.
"""

from __future__ import annotations

import dis
import functools
import re
from collections.abc import Container, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

__all__ = [
    "Instruction",
    "asked_at",
    "bodies_of_loops",
    "instructions",
    "is_raising",
    "names_in",
    "names_read_by",
    "names_stored_by",
    "names_stored_in",
    "names_stored_later_by",
    "operands_of",
    "texts_in",
    "texts_of",
]

_LEAVES = re.compile("POP_|END_FOR|SWAP|RETURN_|DELETE_|STORE_")  # what ends an iterator where nothing is raised
_JUMPS = frozenset(dis.opname[one] for one in (*dis.hasjrel, *dis.hasjabs))
_NOTHING = frozenset({"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "RESUME"})  # what says nothing of what a function does
_HALF = re.compile("(?:LOAD|STORE)_FAST")
_BY_NUMBER = frozenset({"IMPORT_NAME", "STORE_ATTR", "STORE_GLOBAL"})  # which take the place of a name, and no more
_BY_TEXT = frozenset({"__dict__", "globals", "modules", "setattr", "vars"})  # with these, a text may name a variable


class Instruction(NamedTuple):
    """One of them, as ``dis`` names it.

    Attributes:
        opname: Of an operation on one variable, without what a version of Python adds to tell how.
        argval: What it takes.
        argrepr: The same, to read.
        offset: Where it is.
        starts_line: Whether a line of the source begins with it.
    """

    opname: str
    argval: Any
    argrepr: str
    offset: int
    starts_line: bool


def instructions(code: CodeType) -> Iterator[Instruction]:
    """Those of a function itself, in their order."""
    for one in dis.get_instructions(code):
        begins = bool(one.starts_line)  # the number of the line, in older versions
        if isinstance(one.argval, tuple) and len(halves := _HALF.findall(one.opname)) == len(one.argval):
            for number, (half, name) in enumerate(zip(halves, one.argval, strict=True)):
                yield Instruction(half, name, name, one.offset, begins and number == 0)
        else:
            yield Instruction(one.opname, one.argval, one.argrepr, one.offset, begins)


def is_raising(frame: FrameType) -> bool:
    """Whether an iterator that is being closed is so because an exception leaves a ``for`` loop of ``frame``.

    Else the loop is left by ``break`` or ``return``, or the iterator is closed, deleted or replaced.
    """
    before, at, loops = None, None, []
    for one in instructions(frame.f_code):
        if one.opname == "FOR_ITER":
            loops.append((one.offset, one.argval))
        if one.offset <= frame.f_lasti and one.opname not in ("CACHE", "PRECALL"):  # a call stands at what it caches
            before, at = at, one
    if at is None or _LEAVES.match(at.opname):
        return False
    if at.opname.startswith("CALL") and before is not None and before.argval == "close":
        return False
    return any(begin < at.offset < end for begin, end in loops)


def bodies_of_loops(code: CodeType) -> dict[int, list[tuple[str, Any]]]:
    """What the bodies of the ``for`` loops of a function do, wherever they stand in it, by where each loop asks."""
    every = [one for one in instructions(code) if one.opname not in _NOTHING]
    found = {}
    for loop in (one for one in every if one.opname == "FOR_ITER"):
        body = [one for one in every if loop.offset < one.offset < loop.argval]
        place = {one.offset: number for number, one in enumerate(body)}
        found[loop.offset] = [
            (one.opname, place.get(one.argval) if one.opname in _JUMPS else one.argval) for one in body
        ]
    return found


def asked_at(frame: FrameType) -> int:
    """Where in its code a frame is that waits for what it has called."""
    every = (one.offset for one in instructions(frame.f_code) if one.opname not in _NOTHING)
    return max((one for one in every if one <= frame.f_lasti), default=-1)


@functools.cache
def names_in(code: CodeType) -> frozenset[str]:
    """The names of variables of modules and of attributes in a function's code, and in that of those within it."""
    inner = (names_in(one) for one in code.co_consts if isinstance(one, CodeType))
    return frozenset(code.co_names).union(*inner)


@functools.cache
def texts_in(code: CodeType) -> frozenset[str]:
    """What may name a variable in a function's code as text."""
    return texts_of(code) if _BY_TEXT & names_in(code) else frozenset()


def texts_of(code: CodeType) -> frozenset[str]:
    """What may be a name among the texts in a function's code, and in that of those within it."""
    inner = (texts_of(one) for one in code.co_consts if isinstance(one, CodeType))
    return frozenset(one for one in code.co_consts if type(one) is str and one.isidentifier()).union(*inner)


@functools.cache
def operands_of(code: CodeType, operation: str) -> frozenset[str]:
    """What the instructions of this name take in a function's code, and in that of those within it."""
    names = _names_of(code, operation) if operation in _BY_NUMBER else _texts_of(code, operation)
    inner = (operands_of(one, operation) for one in code.co_consts if isinstance(one, CodeType))
    return frozenset(names.union(*inner))


def _texts_of(code: CodeType, operation: str) -> set[str]:
    return {str(one.argval) for one in instructions(code) if one.opname == operation}


def _names_of(code: CodeType, operation: str) -> set[str]:
    """As :func:`_texts_of`, in a hundredth of the time: those of a library's classes are looked for at every start."""
    operations, numbers = code.co_code[::2], code.co_code[1::2]
    found, at = set(), operations.find(dis.opmap[operation])
    while at >= 0:
        number, before = numbers[at], at - 1
        while before >= 0 and operations[before] == dis.EXTENDED_ARG:
            number |= numbers[before] << 8 * (at - before)
            before -= 1
        found.add(code.co_names[number])
        at = operations.find(dis.opmap[operation], at + 1)
    return found


@functools.cache
def names_stored_by(kind: type) -> frozenset[str]:
    """The attributes that the methods of a class, without those of its bases, set on any object."""
    return _named_by(kind, "STORE_ATTR")


def names_stored_in(method: Any) -> frozenset[str]:
    """The attributes that one function or method sets on any object."""
    code = getattr(getattr(method, "__func__", method), "__code__", None)
    return operands_of(code, "STORE_ATTR") if issubclass(type(code), CodeType) else frozenset()


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
    return frozenset().union(*(operands_of(code, operation) for code in codes if code is not None))
