"""Numbers in memory that others share: ``multiprocessing.Value`` and ``Array``, those of ``ctypes``, a ``memoryview``.

A program tells its data workers by these how far training is. Promise: what is stored is filled into the object that
the program made in this process, which its workers know; none is made anew. Not of this kind are pointers, which mean
nothing in another process; events, by which threads and processes are ended; and values of a
``multiprocessing.Manager``, each of which another process would have to be asked for.
"""

from __future__ import annotations

import ctypes
import multiprocessing.sharedctypes
from typing import Any

__all__ = ["fill_shared", "shared_bytes_of"]

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
