"""Whether Python's global generator has been used since it was seeded, answered in a microsecond.

``random.getstate()`` makes a tuple of 625 numbers, which every batch of some streams would pay for. In CPython the
position and the words of the Mersenne Twister follow the object's header (``RandomObject`` in ``_randommodule.c``).
They are only read, never written, and only where they were found there when this module was loaded.
"""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

__all__ = ["is_fresh"]

_BOUND: Any = random.random
_GENERATOR: random.Random = _BOUND.__self__
_WORDS = 624
_FIRST_WORD = 0x8000_0000  # what seeding leaves as the first word, whatever the seed (init_by_array of MT19937)


def _address_if_known() -> int | None:
    """Where position and words of the global generator lie, if they lie there as expected."""
    if sys.implementation.name != "cpython" or random.Random.__basicsize__ < object.__basicsize__ + 4 * (_WORDS + 1):
        return None
    address = id(_GENERATOR) + object.__basicsize__
    position, *words = (ctypes.c_uint32 * (_WORDS + 1)).from_address(address)
    return address if (*words, position) == _GENERATOR.getstate()[1] else None


_address = _address_if_known()


def is_fresh() -> bool:
    """Whether the seeding of the global generator is the last thing that happened to it."""
    if _GENERATOR.gauss_next is not None:  # type: ignore[attr-defined]
        return False
    if _address is None:
        words = _GENERATOR.getstate()[1]
        return bool(words[0] == _FIRST_WORD and words[-1] == _WORDS)
    position, first = (ctypes.c_uint32 * 2).from_address(_address)
    return first == _FIRST_WORD and position == _WORDS
