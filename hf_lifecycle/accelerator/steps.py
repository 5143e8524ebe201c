"""How many optimizer steps a loop has taken, and whether the batch at hand has been trained on.

A step is a batch on which an optimizer of the accelerator has stepped; several optimizers that step on one batch make
one step. A step that a gradient scaler left out counts: the batch has been used. Where an optimizer tells no one of its
steps (DeepSpeed's), ``accelerator.sync_gradients`` tells.
"""

from __future__ import annotations

from typing import Any

from hf_lifecycle.copies import Hook

__all__ = ["Steps"]


class Steps:
    """Counts the steps of the optimizers that ``accelerator`` prepared.

    Args:
        accelerator: The loop's accelerator; optimizers that it prepares later are seen too.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._settled = 0
        self._stepped = False
        self._has_batch = False
        self._handles: list[Any] = []
        self._watched: list[Any] = []

    @property
    def count(self) -> int:
        """The steps taken, that on the batch at hand included once it is taken."""
        return self._settled + self.trained

    @property
    def trained(self) -> bool:
        """Whether an optimizer has stepped since the last batch was handed out."""
        return self._stepped or (self._has_batch and self._accelerator.sync_gradients and self._was_left_out())

    @property
    def knows(self) -> bool:
        """Whether the optimizers tell of their steps, so that a batch without one has not been trained on."""
        return bool(self._watched) and all(hasattr(one, "register_step_post_hook") for one in self._watched)

    def _was_left_out(self) -> bool:
        optimizers = self._accelerator._optimizers
        scaled = any(optimizer.scaler is not None and optimizer.step_was_skipped for optimizer in optimizers)
        return scaled or (bool(optimizers) and not self.knows)

    def watch(self) -> None:
        """Listen to the optimizers there are now."""
        for optimizer in self._accelerator._optimizers:
            inner = optimizer.optimizer
            if not any(inner is known for known in self._watched):
                self._watched.append(inner)
                if hasattr(inner, "register_step_post_hook"):
                    self._handles.append(inner.register_step_post_hook(Hook(self._note)))

    def _note(self, *_: Any) -> None:
        self._stepped = True

    def settle(self, *, has_batch: bool = False) -> int:
        """Count the step on the batch at hand, which is done with. ``has_batch``: another one is handed out.

        Returns the steps taken.
        """
        self._settled = self.count
        self._stepped, self._has_batch = False, has_batch
        return self._settled

    def set(self, count: int) -> None:
        """Go on from a count that was saved."""
        self._settled, self._stepped, self._has_batch = count, False, False

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched = [], []
