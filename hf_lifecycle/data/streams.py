"""Random numbers of their own for every batch and every order of indices.

Promise: inside a stream Python's, NumPy's and torch's CPU generator hold what the stream's key says, and outside it
they are as if the stream had never run. So a batch depends on its key alone: not on prefetching, not on the number of
data workers, not on what the model drew, not on how often the run was broken off. Accelerator generators are not
touched.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import xxhash

from hf_lifecycle.state.rng import HOST_SOURCES

__all__ = ["HeldStream", "KeyedScope", "key_seed", "seed_host"]

Key = tuple[int | str, ...]


def key_seed(key: Key) -> int:
    """A 128-bit seed for ``key``: XXH3-128 over its parts, each written with its type and a separator."""
    return int(xxhash.xxh3_128_intdigest(repr(key).encode()))


def seed_host(seed: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generator from a 128-bit ``seed``.

    Only ``torch.default_generator`` is seeded: ``torch.manual_seed`` would reach the accelerators as well.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # an array of words would take five times as long
    torch.default_generator.manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)


def _read_host() -> tuple[Any, ...]:
    return tuple(source.read() for source in HOST_SOURCES)


def _write_host(states: tuple[Any, ...]) -> None:
    for source, state in zip(HOST_SOURCES, states, strict=True):
        source.write(state)


class KeyedScope:
    """The host generators seeded from a key between :meth:`open` and :meth:`close`.

    It is two calls rather than one ``with`` block because a batch of an iterable dataset begins in the dataset's
    iterator and ends in the collation. In a data worker nothing else draws, so there nothing is put back.
    """

    __slots__ = ("_outer", "is_open")

    def __init__(self) -> None:
        self._outer: tuple[Any, ...] | None = None
        self.is_open = False

    def open(self, key: Key) -> int:
        """Enter the stream of ``key`` and return its seed."""
        seed = key_seed(key)
        self._outer = _read_host() if torch.utils.data.get_worker_info() is None else None
        seed_host(seed)
        self.is_open = True
        return seed

    def close(self) -> None:
        """Leave the stream; the generators are as they were before :meth:`open`."""
        if self._outer is not None:
            _write_host(self._outer)
        self._outer = None
        self.is_open = False


class HeldStream:
    """A stream that goes on where it was left: each ``with`` block continues the one before it."""

    __slots__ = ("_inner", "_key", "_outer")

    def __init__(self, key: Key) -> None:
        self._key = key
        self._inner: tuple[Any, ...] | None = None
        self._outer: tuple[Any, ...] = ()

    def __enter__(self) -> HeldStream:
        self._outer = _read_host()
        if self._inner is None:
            seed_host(key_seed(self._key))
        else:
            _write_host(self._inner)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._inner = _read_host()
        _write_host(self._outer)
