"""Which frame runs a training, told from others without keeping it alive: it has the model in it."""

from __future__ import annotations

from types import FrameType

__all__ = ["TrainingFrame"]


class TrainingFrame:
    """The frame of one training loop, or none that is known."""

    def __init__(self, frame: FrameType | None) -> None:
        self._which = None if frame is None else (id(frame), frame.f_code)

    def is_below(self, innermost: FrameType | None) -> bool:
        """Whether it has not been left by the code that ``innermost`` is the last frame of; true of an unknown one."""
        if self._which is None:
            return True
        while innermost is not None:
            if (id(innermost), innermost.f_code) == self._which:
                return True
            innermost = innermost.f_back
        return False
