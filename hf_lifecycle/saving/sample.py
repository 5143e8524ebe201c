"""A few elements of many tensors at one moment, to find a write that no version counter tells of.

Promise: a tensor that is named has changed. Not promised: that one which has changed is named; a write that misses
every element looked at, or is put back by then, is not seen. Nothing is drawn: which elements, ``turn`` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

__all__ = ["Known", "Sample"]

_ELEMENTS = 8  # of each tensor, strided over all of it
_TURNS = 8  # for which a view is kept
_STEP = 2654435761  # Knuth's multiplicative constant: turns far apart for any stride


Known = dict[str, tuple[tuple[int, int, torch.dtype], torch.Tensor | None]]


class Sample:
    """What the elements were when this was made.

    Args:
        tensors: Dense tensors by name. They are kept.
        turn: Decides which elements.
        known: Where it finds its views of the tensors again, most of which look at the same elements for some turns: to
            make all of them anew takes several times as long as to read what they show.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], turn: int, known: Known | None = None) -> None:
        self._turn = turn
        self._tensors = tensors
        known = {} if known is None else known
        self._groups: dict[tuple[torch.dtype, torch.device], tuple[list[str], list[torch.Tensor]]] = {}
        with torch.no_grad():
            for number, (name, tensor) in enumerate(tensors.items()):
                found = known.get(name)
                key = _place(tensor)
                if found is None or found[0] != key or (turn + number) % _TURNS == 0:
                    found = known[name] = key, self._view(tensor) if key[1] else None
                if found[1] is not None:
                    names, views = self._groups.setdefault((tensor.dtype, tensor.device), ([], []))
                    names.append(name)
                    views.append(found[1])
            self._before = {key: self._gather(views) for key, (_, views) in self._groups.items()}

    def _view(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel()
        if not tensor.is_contiguous():
            size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        step = max(1, size // _ELEMENTS)
        first = tensor.storage_offset() + self._turn * _STEP % step
        return tensor.as_strided((min(_ELEMENTS, size),), (step,), first)

    @staticmethod
    def _gather(views: list[torch.Tensor]) -> torch.Tensor:
        """The elements of all, one after the other, in host memory."""
        return torch.cat(views).cpu() if views else torch.empty(0)

    def _with(self, key: tuple[torch.dtype, torch.device]) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(*self._groups[key], strict=True)

    def changed(self) -> list[str]:
        """The names of those tensors whose elements are others now."""
        with torch.no_grad():
            return [
                name
                for key, (names, views) in self._groups.items()
                for name in _differing(names, views, self._before[key], self._gather(views))
            ]

    def unlike(self, copy_of: Callable[[str], torch.Tensor]) -> list[str]:
        """The names of those whose copies, which lie as the tensors do, have other elements."""
        found = []
        with torch.no_grad():
            for key, (names, views) in self._groups.items():
                copies = [_same_view(copy_of(name), self._tensors[name], view) for name, view in self._with(key)]
                found += _differing(names, views, self._before[key], self._gather(copies))
        return found


def _place(tensor: torch.Tensor) -> tuple[int, int, torch.dtype]:
    """What tells whether a view is still one of this tensor."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


def _same_view(copy: torch.Tensor, live: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    offset = view.storage_offset() - live.storage_offset() + copy.storage_offset()
    return copy.as_strided(view.shape, view.stride(), int(offset))


def _differing(names: list[str], views: list[torch.Tensor], before: torch.Tensor, now: torch.Tensor) -> list[str]:
    old, new = before.contiguous().view(torch.uint8), now.contiguous().view(torch.uint8)
    if torch.equal(old, new):  # bit for bit: NaN is equal to itself
        return []
    width = before.element_size()
    ends = np.cumsum([view.numel() * width for view in views])
    at = np.flatnonzero((old != new).numpy())
    return [names[number] for number in np.unique(np.searchsorted(ends, at, side="right"))]
