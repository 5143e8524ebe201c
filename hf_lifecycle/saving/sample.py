"""A few elements of many tensors at one moment, to find a write that no version counter tells of.

Promise: a tensor that is named has changed. Not promised: that one which has changed is named; a write that misses
every element looked at, or is put back by then, is not seen. Nothing is drawn: which elements, ``turn`` decides.
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

# By name: where the tensor lies, the view of its elements, and the same as an array where it lies in host memory.
Known = dict[str, tuple[int, torch.Tensor, Any]]


class Sample:
    """What the elements were when this was made.

    Args:
        tensors: Dense tensors by name. They are kept.
        turn: Decides which elements.
        known: Where it finds its views of the tensors again, most of which look at the same elements for some turns: to
            make all of them anew takes several times as long as to read what they show.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], turn: int, known: Known | None = None) -> None:
        self._tensors = tensors
        known = {} if known is None else known
        self._groups: dict[Any, tuple[list[str], list[torch.Tensor], list[Any]]] = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            found = known.get(name)
            if found is None or found[0] != tensor.data_ptr() or (turn + number) % _TURNS == 0:
                if not tensor.numel():
                    continue
                view = _view(tensor, turn)
                # Invariant: the view keeps its memory, so that no other tensor can come to lie at this address.
                found = known[name] = tensor.data_ptr(), view, _words(view) if view.device.type == "cpu" else None
            _, view, words = found
            key = words.dtype if words is not None else (view.dtype, view.device)
            names, views, arrays = self._groups.setdefault(key, ([], [], []))
            names.append(name)
            views.append(view)
            arrays.append(words)
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
