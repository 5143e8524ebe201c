"""Random numbers of their own for every batch and every order of indices.

Promise: inside a stream Python's, NumPy's and torch's CPU generator hold what the stream's key says, and outside it
they are as if the stream had never run. So a batch depends on its key alone: not on prefetching, not on the number of
data workers, not on what the model drew, not on how often the run was interrupted. Accelerator generators are not
touched.
"""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import torch
import xxhash

from hf_lifecycle.state.rng import numpy_rng, python_rng
from hf_lifecycle.state.rng.states import HOST_SOURCES

__all__ = ["HeldStream", "Key", "KeyedScope", "key_seed", "seed_all", "seed_host", "worker_seed"]

Key = tuple[int | str, ...]
_TORCH_HEAD = struct.Struct("<QiiQ")
_POSITIVE = 0x7FFF_FFFF_FFFF_FFFF


def key_seed(key: Key) -> int:
    """A 128-bit seed for ``key``: XXH3-128 over its parts, each written with its type and a separator."""
    return int(xxhash.xxh3_128_intdigest(repr(key).encode()))


def worker_seed(seed: int, epoch: int, worker: int, rank: int) -> int:
    """What ``get_worker_info().seed`` and ``torch.initial_seed()`` are while a worker makes the batches of an epoch."""
    return key_seed((seed, "worker", epoch, worker, rank)) & _POSITIVE


def seed_host(seed: int, initial_seed: int | None = None) -> None:
    """Seed Python's, NumPy's and torch's CPU generator from a 128-bit ``seed``.

    Only ``torch.default_generator`` is seeded: ``torch.manual_seed`` would reach the accelerators as well.

    Args:
        initial_seed: What ``torch.initial_seed()`` is then; it decides no number. None: the seed.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # an array of words would take five times as long
    torch.default_generator.manual_seed(seed & _POSITIVE)
    if initial_seed is not None:
        state = torch.default_generator.get_state()
        state[:8] = torch.frombuffer(bytearray(initial_seed.to_bytes(8, "little")), dtype=torch.uint8)
        torch.default_generator.set_state(state)


def seed_all(key: Key) -> None:
    """Seed all generators of this process, the accelerator's included, from ``key``."""
    derived = key_seed(key)
    seed_host(derived)
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None:
        torch.get_device_module(kind.type).manual_seed_all(derived & _POSITIVE)


def _read_host() -> tuple[Any, ...]:
    return tuple(source.read() for source in HOST_SOURCES)


def _write_host(states: tuple[Any, ...]) -> None:
    for source, state in zip(HOST_SOURCES, states, strict=True):
        source.write(state)


class KeyedScope:
    """The host generators seeded from a key between :meth:`open` and :meth:`close`.

    It is two calls rather than one ``with`` block because a batch of an iterable dataset begins in the dataset's
    iterator and ends in the collation. In a data worker nothing else draws, so there nothing is restored.
    """

    __slots__ = ("_initial_seed", "_outer", "_seed", "is_open")

    def __init__(self) -> None:
        self._outer: tuple[Any, ...] | None = None
        self._seed = self._initial_seed = 0
        self.is_open = False

    def open(self, key: Key, initial_seed: int) -> int:
        """Enter the stream of ``key``, in which ``torch.initial_seed()`` is ``initial_seed``; return its seed."""
        seed = key_seed(key)
        self._outer = _read_host() if torch.utils.data.get_worker_info() is None else None
        seed_host(seed, initial_seed)
        self._seed, self._initial_seed = seed, initial_seed
        self.is_open = True
        return seed

    def is_untouched(self) -> bool:
        """Whether nothing was drawn from the host generators since :meth:`open`. In doubt, it was."""
        if not python_rng.is_fresh():
            return False
        # torch's CPU generator: its seed, one number left before a twist, seeded, and no place in the words yet.
        head = torch.default_generator.get_state()[: _TORCH_HEAD.size].numpy().tobytes()
        if head != _TORCH_HEAD.pack(self._initial_seed, 1, 1, 0):
            return False
        return numpy_rng.is_fresh(self._seed & 0xFFFF_FFFF)

    def close(self) -> None:
        """Leave the stream; the generators are as they were before :meth:`open`."""
        if self._outer is not None:
            _write_host(self._outer)
        self._outer = None
        self.is_open = False


class HeldStream:
    """A stream that continues where it was left: each ``with`` block continues the one before it."""

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
