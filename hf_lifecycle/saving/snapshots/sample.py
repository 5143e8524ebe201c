"""A few elements of many tensors at one moment, to find a write that no version counter tells of.

Promise: a tensor that is named has changed. Not promised: that one which has changed is named; a write that misses
every element looked at, or is restored by then, is not seen. Nothing is drawn: which elements, ``turn`` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Known", "Sample"]

_ELEMENTS = 8  # of each tensor, strided over all of it
_TURNS = 32  # for which a view is kept
_STEP = 2654435761  # Knuth's multiplicative constant: turns far apart for any stride
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # elements as plain words, by their bytes

# The names of tensors, the views of their elements, and the same as arrays where they lie in host memory.
_Group = tuple[list[str], list[torch.Tensor], list[Any]]


class Known:
    """Views of tensors, most of which look at the same elements for some turns.

    To make all of them anew takes several times as long as to read what they show.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Keep no tensor any more."""
        self._names: list[str] = []
        self._pointers: list[int] = []
        self._places: list[tuple[Any, int] | None] = []  # the group and the place in it; None where nothing is to see
        self._groups: dict[Any, _Group] = {}

    def views(self, tensors: Mapping[str, torch.Tensor], turn: int) -> dict[Any, _Group]:
        """The views of the tensors by name, together where they can be read together."""
        names, pointers = list(tensors), [tensor.data_ptr() for tensor in tensors.values()]
        if names != self._names:
            self._make(tensors, turn)
        else:
            due = range(-turn % _TURNS, len(names), _TURNS)
            # Invariant: the view keeps its memory, so that no other tensor can come to lie at this address.
            moved = [number for number, one in enumerate(pointers) if one != self._pointers[number]]
            every = list(tensors.values())
            if not all(self._replace(number, every[number], turn) for number in {*due, *moved}):
                self._make(tensors, turn)
        self._names, self._pointers = names, pointers
        return {key: (list(called), list(views), list(words)) for key, (called, views, words) in self._groups.items()}

    def _make(self, tensors: Mapping[str, torch.Tensor], turn: int) -> None:
        self.clear()
        for name, tensor in tensors.items():
            if not tensor.numel():
                self._places.append(None)
                continue
            key, view, words = _look_at(tensor, turn)
            called, views, arrays = self._groups.setdefault(key, ([], [], []))
            self._places.append((key, len(called)))
            called.append(name)
            views.append(view)
            arrays.append(words)

    def _replace(self, number: int, tensor: torch.Tensor, turn: int) -> bool:
        """Make one view anew. Returns whether it has the place that it had."""
        place = self._places[number]
        if place is None or not tensor.numel():
            return place is None and not tensor.numel()
        key, view, words = _look_at(tensor, turn)
        if key != place[0]:
            return False
        _, views, arrays = self._groups[key]
        views[place[1]], arrays[place[1]] = view, words
        return True


class Sample:
    """What the elements were when this was made.

    Args:
        tensors: Dense tensors by name. They are kept.
        turn: Decides which elements.
        known: Where it finds its views of the tensors again.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], turn: int, known: Known | None = None) -> None:
        self._tensors = tensors
        self._groups = (Known() if known is None else known).views(tensors, turn)
        self._before = {key: _gather(views, arrays) for key, (_, views, arrays) in self._groups.items()}

    def changed(self) -> list[str]:
        """The names of those tensors whose elements are others now."""
        found = []
        for key, (names, views, arrays) in self._groups.items():
            found += _differing(names, views, self._before[key], _gather(views, arrays))
        return found

    def unlike(self, copy_of: Callable[[str], torch.Tensor]) -> list[str]:
        """The names of those whose copies, which lie as the tensors do, in host memory, have other elements."""
        found = []
        for key, (names, views, _) in self._groups.items():
            copies = [
                _same_view(copy_of(name), self._tensors[name], view) for name, view in zip(names, views, strict=True)
            ]
            found += _differing(names, views, self._before[key], _gather(copies, [_words(copy) for copy in copies]))
        return found


def _look_at(tensor: torch.Tensor, turn: int) -> tuple[Any, torch.Tensor, Any]:
    """What the view can be read together with, the view, and the same as an array."""
    view = _view(tensor, turn)
    words = _words(view) if view.device.type == "cpu" else None
    return words.dtype if words is not None else (view.dtype, view.device), view, words


def _view(tensor: torch.Tensor, turn: int) -> torch.Tensor:
    size = tensor.numel()
    if not tensor.is_contiguous():
        size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    step = max(1, size // _ELEMENTS)
    first = tensor.storage_offset() + turn * _STEP % step
    return tensor.detach().as_strided((min(_ELEMENTS, size),), (step,), int(first))


def _same_view(copy: torch.Tensor, live: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    offset = view.storage_offset() - live.storage_offset() + copy.storage_offset()
    return copy.as_strided(view.shape, view.stride(), int(offset))


def _words(view: torch.Tensor) -> npt.NDArray[Any]:
    if view.element_size() not in _WORDS:  # complex128
        return torch.view_as_real(view).numpy().view(np.int64)
    array: npt.NDArray[Any] = view.view(_WORDS[view.element_size()]).numpy()
    return array


def _gather(views: list[torch.Tensor], arrays: list[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of the elements of all, one after the other, in host memory: NaN is equal to itself."""
    if arrays[0] is not None:
        return np.concatenate(arrays, axis=None).view(np.uint8)
    return torch.cat(views).cpu().view(torch.uint8).numpy()


def _differing(
    names: list[str], views: list[torch.Tensor], before: npt.NDArray[np.uint8], now: npt.NDArray[np.uint8]
) -> list[str]:
    if before.tobytes() == now.tobytes():
        return []
    ends = np.cumsum([view.numel() * view.element_size() for view in views])
    return [names[number] for number in np.unique(np.searchsorted(ends, np.flatnonzero(before != now), side="right"))]
