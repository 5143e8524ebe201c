"""The instructions of a function's code, alike in every version of Python.

Promise: each loads or stores one variable. Newer versions have instructions that do two of these at once.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

__all__ = ["Instruction", "instructions", "is_raising"]

_LEAVES = re.compile("POP_|END_FOR|SWAP|RETURN_|DELETE_|STORE_")  # what ends an iterator where nothing is raised
_HALF = re.compile("(?:LOAD|STORE)_FAST")


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
