"""Plain values in the variables of the program that runs: of the user's functions that have called, up to the script.

Counters in variables of modules that these functions set are among them, by their names. Promise: a value is told by a
short text, which is the same in another process that has the same value. Nothing is kept alive, and no variable is
written. Of a tensor or a large container the text is a sample's.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import sys
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Sequence
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from hf_lifecycle.bytecode import Instruction, instructions
from hf_lifecycle.libraries import is_of_user, lies_with_user
from hf_lifecycle.state.fingerprint import is_shared_out, tensor_digest, tree_digest
from hf_lifecycle.state.gathering import is_dense
from hf_lifecycle.state.reachable import attributes_of
from hf_lifecycle.state.values.functions import counters_of
from hf_lifecycle.state.values.trees import GENERATORS, GLOBAL_GENERATORS, PLAIN_SCALARS, copied

__all__ = ["values_of_program"]

_CONTAINERS = (list, dict, set, deque)
_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_OTHERS = (torch.nn.Module, torch.optim.Optimizer, torch.utils.data.Dataset, torch.utils.data.Sampler, type)
_FRAMES = 12
_SMALL = 16  # items of a container that are shown
_LONGEST = 60
_SAMPLE = 16  # elements of a tensor
_ITEMS = 256  # of a container whose tensors are looked at
_BEFORE_RETURN = ("BUILD_", "SWAP", "ROT_", "POP_TOP")
_ADDS = frozenset({"append", "extend", "add", "update", "appendleft"})
_ASK_FOR_ALL = frozenset({"locals", "vars", "exec", "eval"})  # what they return is the dict that a frame would give


def values_of_program(
    passed: Container[int], wanted: Container[str] | None, left_out: Callable[[Any], bool]
) -> dict[str, str]:
    """Each plain value in a variable, or in an attribute of a user's object in one, such as ``step of train()``.

    Args:
        passed: What ``id()`` says of objects that others see to.
        wanted: The names of those that are looked at; None: all.
        left_out: Tells values that are left out.
    """
    found: dict[str, str] = {}
    seen: set[int] = set()
    for frame in reversed(_frames()):
        where = _called(frame.f_code)
        for name, value in _variables(frame).items():
            if type(value) not in PLAIN_SCALARS and (id(value) in passed or id(value) in seen):
                continue
            seen.add(id(value))
            for path, one in _within(name, value, 0):
                path += where
                if path in found or (wanted is not None and path not in wanted) or left_out(one):
                    continue
                found[path] = _text(one)
        for path, one in counters_of(frame):
            if path not in found and (wanted is None or path in wanted) and not left_out(one):
                found[path] = _text(one)
    return found


def _frames() -> list[FrameType]:
    """Of the user's functions that have called, the last one first."""
    found: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < _FRAMES:
        if lies_with_user(str(frame.f_globals.get("__name__"))):
            found.append(frame)
        frame = frame.f_back
    return found


def _called(code: CodeType) -> str:
    if code.co_name == "<module>":
        return ""
    return f" of {getattr(code, 'co_qualname', code.co_name).rpartition('<locals>.')[2]}()"


def _variables(frame: FrameType) -> dict[str, Any]:
    """The variables of a function that runs, or of its module, but for those that decide nothing."""
    code = frame.f_code
    if not code.co_flags & inspect.CO_OPTIMIZED:
        values = dict(frame.f_locals)
    elif _asks_for_all(code):
        return {}
    else:
        held = frame.f_locals
        values = dict(held)
        if sys.version_info < (3, 13):
            held.clear()  # the frame would keep it, and all that is in it, alive
    return {
        name: one
        for name, one in values.items()
        if not name.startswith((".", "__")) and not _decides_nothing(code, name, one)
    }


@functools.cache
def _asks_for_all(code: CodeType) -> bool:
    """Whether it calls one of these functions; methods that are called so, such as ``model.eval()``, are others."""
    return bool(_ASK_FOR_ALL & set(code.co_names)) and any(
        one.opname in ("LOAD_GLOBAL", "LOAD_NAME") and one.argval in _ASK_FOR_ALL for one in instructions(code)
    )


def _decides_nothing(code: CodeType, name: str, value: Any) -> bool:
    """Whether a loop goes through it, or only adds to it. A number that one loop alone counts with may decide."""
    loops = _targets(code)[name]
    return loops > 1 or (loops == 1 and type(value) not in (int, float)) or name in _added_to(code)


@functools.cache
def _added_to(code: CodeType) -> frozenset[str]:
    """The variables that the loops of a function only add to, as to a list of losses, and do not read."""
    code_of = list(instructions(code))
    ends = {one.argval: one.offset for one in code_of if one.opname.startswith("JUMP") and _goes_back(one)}
    added: set[str] = set()
    read = {name for one in code.co_consts if isinstance(one, CodeType) for name in (*one.co_names, *one.co_freevars)}
    for number, one in enumerate(code_of):
        if one.opname.startswith("LOAD_") and any(begin <= one.offset < end for begin, end in ends.items()):
            (added if _only_adds(code_of, number) else read).add(str(one.argval))
    return frozenset(added - read)


def _goes_back(one: Instruction) -> bool:
    return isinstance(one.argval, int) and one.argval < one.offset


def _only_adds(code: Sequence[Instruction], number: int) -> bool:
    """Whether what is loaded here is a list that gets an item, is a number that is set to a sum, or is returned."""
    following = next(one for one in code[number + 1 :] if not one.opname.startswith(_BEFORE_RETURN))
    if following.opname == "RETURN_VALUE":
        return True
    if following.opname in ("LOAD_METHOD", "LOAD_ATTR"):
        return following.argval in _ADDS
    if not code[number].starts_line:  # it is not what is added to
        return False
    for before, one in itertools.pairwise(code[number:]):
        if one.opname.startswith("STORE_"):
            adds = (
                before.argrepr.endswith("=") if before.opname == "BINARY_OP" else before.opname.startswith("INPLACE_")
            )
            return adds and one.argval == code[number].argval
        if one.opname.startswith(("POP_", "JUMP", "RETURN")):
            return False
    return False


@functools.cache
def _targets(code: CodeType) -> Counter[str]:
    """In how many loops each name is what the loop goes through."""
    found: Counter[str] = Counter()
    is_target = False
    for one in instructions(code):
        if one.opname.startswith("STORE_") and is_target:
            found[str(one.argval)] += 1
        elif not one.opname.startswith("UNPACK_"):
            is_target = one.opname.startswith("FOR_ITER")
    return found


def _within(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """A value, and those in attributes of a user's object, or of some in a small list."""
    yield name, value
    if isinstance(value, (list, tuple)) and len(value) <= _SMALL and not depth:
        for number, one in enumerate(value):
            if _is_users(one):
                yield from _within(f"{name}[{number}]", one, 1)
    elif _is_users(value):
        yield from ((f"{name}.{key}", one) for key, one in list(attributes_of(value).items()))


def _is_users(value: Any) -> bool:
    return isinstance(value, _NAMESPACES) or (is_of_user(type(value)) and not isinstance(value, _OTHERS))


def _text(value: Any) -> str:
    if type(value) in PLAIN_SCALARS or isinstance(value, (np.generic, itertools.count)):
        return repr(value)[:_LONGEST]
    if isinstance(value, _CONTAINERS):
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if len(value) <= _SMALL and all(type(one) in PLAIN_SCALARS for one in items):
            return repr(sorted(value, key=repr) if isinstance(value, set) else value)[:_LONGEST]
        tensors = [one for one in itertools.islice(items, _ITEMS) if _is_plain_tensor(one)]
        return f"{type(value).__name__} of {len(value)}{_digest(tensors)}"
    if isinstance(value, torch.amp.GradScaler):
        return repr(value.state_dict())
    if isinstance(value, GENERATORS) and id(value) not in GLOBAL_GENERATORS:
        return f"{type(value).__name__} {tree_digest(copied(value))[:8]}"
    if _is_plain_tensor(value):
        return repr(value.item()) if value.numel() == 1 else f"tensor{_digest([value])}"
    return type(value).__name__


def _is_plain_tensor(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or is_shared_out(value):
        return False
    return is_dense(value) and value.is_contiguous()


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    """Of a few elements of each; nothing where there is none."""
    if not tensors:
        return ""
    few = [one.detach().reshape(-1)[:: max(1, one.numel() // _SAMPLE)].double() for one in tensors]
    return f" {tensor_digest(torch.cat([one.to(few[0].device) for one in few]))[:8]}"
