"""A CUDA stream beside the one that trains, for copies that training waits for at a fence alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["SideStream"]


class SideStream:
    """Where copies from an accelerator run; of no use, and no cost, where the tensors are on the CPU.

    Args:
        device: The accelerator; None for the CPU.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.used = device is not None
        self._device = device

    @classmethod
    def of(cls, devices: Iterable[torch.device]) -> SideStream:
        """The stream for copies of what lies on these."""
        return cls(next((device for device in devices if device.type == "cuda"), None))

    def enter(self) -> None:
        """Let the side stream begin where the training stream is now, after the copies that were asked for on it."""
        if self.used:
            self._training = torch.cuda.current_stream(self._device)
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._side.wait_stream(self._training)

    def side(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, copies are asked for on the side stream; for any thread."""
        return torch.cuda.stream(self._side) if self.used else contextlib.nullcontext()

    def training(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, what is asked of the device comes after all that training asked for; for any thread."""
        return torch.cuda.stream(self._training) if self.used else contextlib.nullcontext()

    def finish(self) -> None:
        """Wait until the copies are made."""
        if self.used:
            self._side.synchronize()
