"""What differs where a plain value was changed: a copy of what is small, a sample of what is large.

Promise: equal values have equal marks. Not promised: that a change within a large value is seen, where it misses every
sampled element.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections import deque
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

from hf_lifecycle.state.fingerprint import tensor_digest
from hf_lifecycle.state.values.known import NOTHING_KNOWN, KnownObjects
from hf_lifecycle.state.values.trees import LARGEST, PLAIN_SCALARS, NotPlain, Walk
from hf_lifecycle.torch_internals import version_counter

__all__ = ["Clocks", "has_only_grown", "mark_of"]

_CLOCKS = (time.time, time.monotonic, time.perf_counter, time.process_time)
_DIGITS = 3  # a number that has no more of them after the point was not read from a clock
_MOST_MARKED = 1_250  # nodes of one that are compared; training waits for it
_SAMPLE = 512  # elements
_WHOLE = 1 << 14  # bytes of a tensor of which no sample is taken, such as the state of a generator, made when asked for
_FIRST = 64  # items of a large dictionary
_OF_A_ROW = 8


def mark_of(value: Any, left: KnownObjects = NOTHING_KNOWN) -> Any:
    """What differs where a value was changed; a sample of what is large.

    Args:
        value: Any value.
        left: Generators and parameters that others take care of, and what keys may name.

    Raises:
        NotPlain: It holds something that has code.
    """
    if type(value) in PLAIN_SCALARS:
        return value
    walk = Walk(
        _MOST_MARKED, LARGEST, _mark_of_tensor, _mark_of_array, left=left, at_once=8, iterator=_mark_of_iterator
    )
    try:
        return type(value), walk.tree(value)
    except NotPlain as why:
        if not why.is_large:
            raise
        return type(value), "large", *_sampled(value)


def _sampled(value: Any) -> tuple[Any, ...]:
    kind = type(value)
    if issubclass(kind, torch.Tensor):
        return (_mark_of_tensor(value),)
    if issubclass(kind, np.ndarray):
        return (_mark_of_array(value) if not value.dtype.hasobject else value.shape,)
    if issubclass(kind, dict):
        some = list(itertools.islice(dict.items(value), _FIRST))  # at once: other threads may add to it
        return dict.__len__(value), [(key, _itself(one)) for key, one in some if type(key) in PLAIN_SCALARS]
    for base in (list, tuple):
        if issubclass(kind, base):
            count = base.__len__(value)
            return count, [_itself(one) for one in base.__getitem__(value, slice(None, None, max(1, count // _SAMPLE)))]
    return (operator.length_hint(value, 0) if kind in (deque, set, frozenset) else 0,)


def _itself(one: Any, depth: int = 0) -> Any:
    if type(one) in PLAIN_SCALARS:
        return one
    if depth == 0 and type(one) in (dict, list, tuple):  # a row, which may be changed in place
        held = one.values() if type(one) is dict else one
        return id(one), len(one), [_itself(each, 1) for each in itertools.islice(held, _OF_A_ROW)]
    return id(one)


def has_only_grown(before: Any, now: Any) -> bool:
    """Whether a dictionary, by these marks, has what it had, and perhaps more behind it, as a cache has."""
    if not (isinstance(before, tuple) and isinstance(now, tuple) and issubclass(before[0], dict)):
        return False
    if before[0] is not now[0] or len(before) != len(now):
        return False
    if before[1] == "large":
        return bool(before[2] <= now[2] and before[3] == now[3])
    return bool(now[1]["of"][: len(before[1]["of"])] == before[1]["of"])


def _mark_of_iterator(one: Any) -> Any:
    call = one.__reduce__()
    held = call[1][0] if call[1] else ()
    rows = held[:: max(1, len(held) // _FIRST)] if type(held) in (list, tuple, range, str) else ()
    return operator.length_hint(one, 0), list(map(_itself, rows))


def _mark_of_tensor(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().reshape(-1)
    if flat.nbytes <= _WHOLE:
        return tensor.shape, tensor_digest(flat)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)]
    return tensor.shape, version_counter(tensor), tensor.data_ptr(), tensor_digest(sample)


def _mark_of_array(array: Any) -> Any:
    flat = array.reshape(-1) if array.nbytes <= 1 << 20 else array.reshape(-1)[:: array.size // _SAMPLE]
    return array.shape, array.dtype.str, flat.tobytes()


class Clocks:
    """Tells numbers that were read from a clock since this was made."""

    def __init__(self) -> None:
        self._began = tuple(clock() for clock in _CLOCKS)

    def gave(self, value: Any) -> bool:
        """Whether ``value`` is such a number, or the mark of a date and time that is."""
        if type(value) is tuple and value and value[0] is datetime:
            moment = datetime.fromisoformat(value[1]["of"][0])
            zones = [moment.tzinfo] if moment.tzinfo else [None, timezone.utc]
            stamps = [moment.replace(tzinfo=zone).timestamp() for zone in zones]
            return any(self._began[0] <= stamp <= time.time() for stamp in stamps)
        if type(value) is not float or value == round(value, _DIGITS):
            return False
        return any(began <= value <= clock() for clock, began in zip(_CLOCKS, self._began, strict=True))
