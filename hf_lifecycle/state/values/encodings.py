"""Values of standard types that are no text, number, container or tensor: taken apart into such, and made again.

Promise: what is made again is equal to what was taken apart. No code of a user's runs; a class or a function is found
again by its name, in a module of the user's that is imported already. One row for each type.

Numbers in memory that others share are ``multiprocessing.Value`` and ``Array``, those of ``ctypes``, a ``memoryview``.
A program tells its data workers by these how far training is. Promise: what is stored is filled into the object that
the program made in this process, which its workers know; none is made anew. Not of this kind are pointers, which mean
nothing in another process; events, by which threads and processes are ended; and values of a
``multiprocessing.Manager``, each of which another process would have to be asked for.
"""

from __future__ import annotations

import ast
import ctypes
import datetime
import io
import itertools
import multiprocessing.sharedctypes
import operator
import pathlib
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from types import FunctionType
from typing import Any

import torch

from hf_lifecycle.libraries import is_of_user

__all__ = ["ENCODINGS", "ITERATORS", "encoding_called", "fill_shared", "found_by_name", "name_of", "shared_bytes_of"]

_COMPARED = (bool, int, float, str, bytes, type(None))
_FARTHEST = 10_000_000  # items that an iterator is advanced by


@dataclass(frozen=True, slots=True)
class Encoding:
    """How values of one type are stored.

    Attributes:
        take: Gives plain values for one.
        make: Makes one of these.
        fill: Lets another value of the type become it, in place, and says whether it could.
        of_values: Whether what ``take`` gives are values that are to be taken apart in turn.
    """

    take: Callable[[Any], Any]
    make: Callable[[Any], Any]
    fill: Callable[[Any, Any], bool] = lambda own, content: False  # noqa: ARG005
    of_values: bool = False


def _of_zone(one: Any) -> list[Any]:
    if one.tzinfo is not None and type(one.tzinfo) is not datetime.timezone:
        raise ValueError(f"its time zone is a {type(one.tzinfo).__qualname__}")
    return [one.isoformat(), one.fold]


def _refilled(own: Any, content: Any) -> bool:
    own[:] = content
    return True


def _array_refilled(own: Any, content: Any) -> bool:
    if own.typecode != content[0]:
        return False
    own[:] = _array(content)
    return True


def _array(content: Any) -> array[Any]:
    made: array[Any] = array(content[0])
    made.frombytes(content[1])
    return made


def _count(one: Any) -> list[Any]:
    """Of ``itertools.count``: the next number and the step, which nothing else than its ``repr`` tells everywhere."""
    numbers = ast.literal_eval(repr(one).removeprefix("count"))
    return list(numbers) if isinstance(numbers, tuple) else [numbers, 1]


def _count_advanced(own: Any, content: Any) -> bool:
    number, step = _count(own)
    if step != content[1] or step == 0 or {type(number), type(step), type(content[0])} != {int}:
        return False
    far, rest = divmod(content[0] - number, step)
    return rest == 0 and _advanced(own, far)


def _advanced(own: Iterator[Any], far: int) -> bool:
    if not 0 <= far <= _FARTHEST:
        return False
    deque(itertools.islice(own, far), maxlen=0)
    return True


def _remaining(one: Any) -> list[Any]:
    if operator.length_hint(one) > _FARTHEST:
        raise ValueError("it has too many items")
    call = one.__reduce__()
    if len(call) == 2 or call[2] is None:
        return list(call[0](*call[1]))
    again = call[0](*call[1])
    again.__setstate__(call[2])
    return list(again)


def _iterator_advanced(own: Any, content: Any) -> bool:
    """Where what is left of it ends with these items; others may hold it too."""
    left = _remaining(own)
    far = len(left) - len(content)
    same = (
        type(one) in _COMPARED and type(one) is type(two) and one == two
        for one, two in zip(left[far:], content, strict=False)
    )
    return far >= 0 and all(same) and _advanced(own, far)


def _stream(own: Any) -> list[Any]:
    return [] if own.closed else [own.getvalue(), own.tell()]


def _stream_refilled(own: Any, content: Any) -> bool:
    if content and not own.closed:
        own.seek(0)
        own.truncate()
        own.write(content[0])
        own.seek(content[1])
    return bool(content)


def _new_stream(kind: Any) -> Callable[[Any], Any]:
    def make(content: Any) -> Any:
        made = kind()
        _stream_refilled(made, content)
        return made

    return make


_ITERABLE: tuple[Any, ...] = ([], (), "", range(1), range(2**70))
ITERATORS = tuple({type(iter(one)) for one in _ITERABLE})
_PATHS = (pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path()))

ENCODINGS: dict[type, Encoding] = {
    complex: Encoding(lambda one: [one.real, one.imag], lambda of: complex(*of)),
    Decimal: Encoding(str, Decimal),
    Fraction: Encoding(lambda one: [one.numerator, one.denominator], lambda of: Fraction(*of)),
    range: Encoding(lambda one: [one.start, one.stop, one.step], lambda of: range(*of)),
    slice: Encoding(lambda one: [one.start, one.stop, one.step], lambda of: slice(*of), of_values=True),
    bytearray: Encoding(bytes, bytearray, _refilled),
    array: Encoding(lambda one: [one.typecode, one.tobytes()], _array, _array_refilled),
    datetime.date: Encoding(datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: Encoding(_of_zone, lambda of: datetime.time.fromisoformat(of[0]).replace(fold=of[1])),
    datetime.datetime: Encoding(_of_zone, lambda of: datetime.datetime.fromisoformat(of[0]).replace(fold=of[1])),
    datetime.timedelta: Encoding(
        lambda one: [one.days, one.seconds, one.microseconds], lambda of: datetime.timedelta(*of)
    ),
    torch.dtype: Encoding(lambda one: one, lambda of: of),
    torch.Size: Encoding(list, torch.Size),
    io.StringIO: Encoding(_stream, _new_stream(io.StringIO), _stream_refilled),
    io.BytesIO: Encoding(_stream, _new_stream(io.BytesIO), _stream_refilled),
    itertools.count: Encoding(_count, lambda of: itertools.count(*of), _count_advanced),
    **{kind: Encoding(str, kind) for kind in _PATHS},
    **{kind: Encoding(_remaining, iter, _iterator_advanced, of_values=True) for kind in ITERATORS},
}
_BY_NAME = {f"{kind.__module__}.{kind.__qualname__}": (kind, one) for kind, one in ENCODINGS.items()}


def encoding_called(name: str) -> tuple[type, Encoding] | None:
    """The type of this name, and its row; None without one."""
    return _BY_NAME.get(name)


def name_of(one: Any) -> str:
    """What :func:`found_by_name` finds a class or a function by."""
    return f"{one.__module__}:{one.__qualname__}"


def found_by_name(name: str, kind: type) -> Any:
    """A user's class or function of this name, of this kind; None where there is none. Nothing is imported."""
    module, _, path = name.partition(":")
    one: Any = sys.modules.get(module)
    for key in path.split("."):
        one = vars(one).get(key) if isinstance(one, type) or hasattr(one, "__dict__") else None
        one = getattr(one, "__func__", one) if kind is FunctionType else one
    return one if isinstance(one, kind) and is_of_user(one) and name_of(one) == name else None


_NUMBERS = frozenset("cbB?hHiIlLqQfdg")  # of ctypes' codes
_SYNCHRONIZED: Any = multiprocessing.sharedctypes.SynchronizedBase
_SIMPLE: Any = ctypes.c_int.__mro__[1]
_MOST = 1 << 20  # bytes


def shared_bytes_of(value: Any) -> bytes | None:
    """What it holds; None for what is nothing of the kind."""
    if type(value) is memoryview:
        return value.tobytes() if not value.readonly and value.nbytes <= _MOST else None
    memory = _memory_of(value)
    return None if memory is None else ctypes.string_at(ctypes.addressof(memory), ctypes.sizeof(memory))


def fill_shared(own: Any, content: bytes) -> bool:
    """Let ``own`` hold it, and say whether it could."""
    if type(own) is memoryview and not own.readonly and own.c_contiguous and own.nbytes == len(content):
        own.cast("B")[:] = content
        return True
    memory = _memory_of(own)
    if memory is None or ctypes.sizeof(memory) != len(content):
        return False
    ctypes.memmove(ctypes.addressof(memory), content, len(content))
    return True


def _memory_of(value: Any) -> Any:
    kind: Any = type(value)
    if issubclass(kind, _SYNCHRONIZED):
        value = value.get_obj()
        kind = type(value)
    if issubclass(kind, ctypes.Array):
        kind = kind._type_
    elif not issubclass(kind, _SIMPLE):
        return None
    code = getattr(kind, "_type_", None)
    return value if type(code) is str and code in _NUMBERS and ctypes.sizeof(value) <= _MOST else None
