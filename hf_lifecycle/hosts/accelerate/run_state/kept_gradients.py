"""Gradients that stand when a save is made, and that the next backward pass adds to, are named.

They are in no checkpoint: a resumed run begins without any. Those that a program leaves standing and zeroes before the
next backward pass decide nothing. Promise: one parameter of each model is looked at, when its next gradient comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hf_lifecycle.copies import Hook

__all__ = ["KeptGradients"]

logger = logging.getLogger("hf_lifecycle")


class KeptGradients:
    """Looks after each save, until it has found some."""

    def __init__(self, models: Callable[[], Iterable[torch.nn.Module]]) -> None:
        self._models = models
        self._handles: dict[int, Any] = {}  # by the parameter's id
        self._has_told = False

    def saved(self) -> None:
        """A save was made."""
        self.close()
        for model in () if self._has_told else self._models():
            standing = (one for one in model.parameters() if one.requires_grad and _stands(one))
            parameter = next(standing, None)
            if parameter is not None:
                look = Hook(self._looking_at(parameter))
                self._handles[id(parameter)] = parameter.register_hook(look)  # type: ignore[no-untyped-call]

    def _looking_at(self, parameter: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
        def look(_: torch.Tensor) -> None:
            handle = self._handles.pop(id(parameter), None)
            if handle is not None:
                handle.remove()
                self._look(parameter)

        return look

    def _look(self, parameter: torch.nn.Parameter) -> None:
        """A gradient is about to be added to that of ``parameter``, if it has any."""
        if _stands(parameter) and not self._has_told:
            self._has_told = True
            logger.warning(
                "not exact: the next batch adds to gradients that existed when save() was called, and a resumed run "
                "starts without them: call save() after zero_grad(), or call zero_grad() before each backward pass"
            )

    def close(self) -> None:
        """Look at nothing more."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


def _stands(parameter: torch.nn.Parameter) -> bool:
    gradient = parameter.grad
    return gradient is not None and type(gradient) is torch.Tensor and bool(gradient.any())
