"""A few elements of many tensors at one moment, to find a write that no version counter tells of.

Promise: a tensor that is named has changed. Not promised: that one which has changed is named; a write that misses
every element looked at, or is put back by then, is not seen. Nothing is drawn: which elements, ``turn`` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

__all__ = ["Sample"]

_ELEMENTS = 8  # of each tensor, strided over all of it
_STEP = 2654435761  # Knuth's multiplicative constant: turns far apart for any stride


class Sample:
    """What the elements were when this was made.

    Args:
        tensors: Dense tensors by name. They are kept.
        turn: Decides which elements.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], turn: int) -> None:
        self._turn = turn
        self._groups: dict[tuple[torch.dtype, torch.device], tuple[list[str], list[torch.Tensor]]] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                names, views = self._groups.setdefault((tensor.dtype, tensor.device), ([], []))
                if tensor.numel():
                    names.append(name)
                    views.append(self._view(tensor))
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
                copies = [self._view(copy_of(name)) for name in names]
                found += _differing(names, views, self._before[key], self._gather(copies))
        return found


def _differing(names: list[str], views: list[torch.Tensor], before: torch.Tensor, now: torch.Tensor) -> list[str]:
    old, new = before.contiguous().view(torch.uint8), now.contiguous().view(torch.uint8)
    if torch.equal(old, new):  # bit for bit: NaN is equal to itself
        return []
    width = before.element_size()
    ends = np.cumsum([view.numel() * width for view in views])
    at = np.flatnonzero((old != new).numpy())
    return [names[number] for number in np.unique(np.searchsorted(ends, at, side="right"))]
