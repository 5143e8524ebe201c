"""The code of a custom training loop: what the bodies of its ``for`` loops do, and the functions that they call.

Promise: how often the epochs run, and what stands around the loop, is no part of it. Not seen: what an iterator of the
user's own around the batches does between two of them, a loop that asks with ``next()``, and the body of one in a cell
of a notebook, which has no name.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from types import FrameType, FunctionType, ModuleType
from typing import Any

from hf_lifecycle.bytecode import asked_at, bodies_of_loops
from hf_lifecycle.libraries import is_of_user, lies_with_user
from hf_lifecycle.state.program import code_of, digest_of_code

__all__ = ["asking_frame", "code_of_loop"]

_PARTS = ("LOAD_ATTR", "LOAD_METHOD")


def asking_frame() -> FrameType | None:
    """The function of the user's that waits for this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not lies_with_user(str(frame.f_globals.get("__name__"))):
        frame = frame.f_back
    return frame


def code_of_loop(frame: FrameType) -> dict[str, Any] | None:
    """What the loop that waits is, in text; None where no ``for`` loop does.

    Returns:
        ``code`` of what its function calls in loops, the digests of the ``bodies`` of all loops there, and which of
        them is ``asking``; none of a cell.
    """
    bodies = bodies_of_loops(frame.f_code)
    digests = {at: digest_of_code([(name, digest_of_code(one)) for name, one in body]) for at, body in bodies.items()}
    at = asked_at(frame)
    if at not in digests:
        return None
    called = dict(_called(frame, [one for body in bodies.values() for one in body]))
    # All lambdas have one name: theirs is that of the variable.
    functions = {name: one for name, one in called.items() if type(one) is FunctionType and is_of_user(one)}
    lambdas = {name: one for name, one in functions.items() if one.__name__ == "<lambda>"}
    named = code_of((one for name, one in called.items() if name not in lambdas), without=frame.f_code)
    code = named | {name: digest_of_code(one.__code__) for name, one in lambdas.items()}
    is_cell = frame.f_code.co_name == "<module>" and "__file__" not in frame.f_globals
    return {
        "code": code,
        "bodies": [] if is_cell else sorted(set(digests.values())),
        "asking": "" if is_cell else digests[at],
        "python": platform.python_version(),
    }


def _called(frame: FrameType, body: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What the names in it are of."""
    names = {one for operation, one in body if operation.startswith("LOAD_") and type(one) is str}
    parts = {one for operation, one in body if operation in _PARTS and type(one) is str}
    spaces = (frame.f_locals, frame.f_globals)
    for name in sorted(names):
        value = next((space[name] for space in spaces if name in space), None)
        if issubclass(type(value), ModuleType) and is_of_user(value):
            yield from ((f"{name}.{part}", vars(value)[part]) for part in sorted(parts) if part in vars(value))
        elif value is not None:
            yield name, value
