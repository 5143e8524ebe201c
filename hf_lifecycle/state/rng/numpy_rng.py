"""NumPy's global generator, read and written in microseconds.

Promise: :func:`read` and :func:`write` do what ``numpy.random.get_state`` and ``set_state`` do, bit for bit, the cached
gaussian included. Those two take some 35 µs each, which every batch would pay; here the Mersenne Twister's state is
copied through the address that ``BitGenerator.ctypes`` documents. Where the layout is not the known one, or another
bit generator was put in, NumPy's own functions are used.

The cached gaussian lies outside that memory. It is found by drawing a standard normal: where one was cached, it comes
out and the twister does not move. The legacy generator's polar method makes two at a time and keeps the second (see
``numpy.random.RandomState``).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

__all__ = ["is_fresh", "read", "write"]

_WORDS = 624
_SIZE = 4 * _WORDS + 4  # uint32_t key[624]; int pos;


def _bit_generator() -> Any:
    """The bit generator of NumPy's global generator; None where this NumPy does not show it."""
    try:
        return np.random.mtrand._rand._bit_generator
    except AttributeError:
        return None


def _address_if_known() -> int | None:
    """Where the state of the global generator lies, if it lies there as expected."""
    try:
        generator = _bit_generator()
        if type(generator) is not np.random.MT19937:
            return None
        address = int(generator.ctypes.state_address)
        memory = ctypes.string_at(address, _SIZE)
        state = generator.state["state"]
        same = memory == state["key"].astype("<u4").tobytes() + int(state["pos"]).to_bytes(4, "little")
    except (AttributeError, KeyError, TypeError, ValueError):  # another NumPy; its own functions serve
        return None
    return address if same else None


_generator = _bit_generator()
_address = _address_if_known()


def _is_fast() -> bool:
    return _address is not None and _bit_generator() is _generator


def read() -> tuple[Any, ...]:
    """``(kind, words (uint32, 624), position, has_gauss, gauss)``, as ``numpy.random.get_state()`` gives it."""
    if not _is_fast():
        return tuple(np.random.get_state())
    assert _address is not None
    memory = ctypes.string_at(_address, _SIZE)
    gauss = np.random.standard_normal()
    has_gauss = ctypes.string_at(_address, _SIZE) == memory
    words = np.frombuffer(memory, dtype=np.uint32, count=_WORDS)
    state = ("MT19937", words, int.from_bytes(memory[-4:], "little"), int(has_gauss), gauss if has_gauss else 0.0)
    write(state)
    return state


def write(state: tuple[Any, ...]) -> None:
    """Set the global generator to ``state``, as ``numpy.random.set_state`` does."""
    kind, words, position, has_gauss, _ = state
    if has_gauss or kind != "MT19937" or not _is_fast():
        np.random.set_state(state)
    else:
        np.random.seed(0)  # drops a cached gaussian
        assert _address is not None
        ctypes.memmove(_address, words.tobytes() + int(position).to_bytes(4, "little"), _SIZE)


def is_fresh(seed: int) -> bool:
    """Whether ``numpy.random.seed(seed)`` (of 32 bits) is the last thing that happened to the global generator.

    The twister's first word is then the seed, and the next draw begins with a twist; a gaussian is only cached by a
    draw.
    """
    if _is_fast():
        assert _address is not None
        memory = ctypes.string_at(_address, _SIZE)
        first, position = memory[:4], memory[-4:]
        return first == seed.to_bytes(4, "little") and position == _WORDS.to_bytes(4, "little")
    state: Any = np.random.get_state()
    return bool(state[0] == "MT19937" and state[1][0] == seed and state[2] == _WORDS)
