"""How many optimizer steps a loop has taken, and whether the batch at hand has been trained on.

A step is a batch on which an optimizer of the accelerator has stepped, or one that was not prepared and holds
parameters of a prepared model, or any where none was prepared; several that step on one batch make one step. A step
that a gradient scaler left out counts: the batch has been used. Where an optimizer tells no one of its steps
(DeepSpeed's), ``accelerator.sync_gradients`` tells.

Steps that are taken outside the bodies of batches have no place that a save could keep: of a loader that is iterated as
it is, of batches that were put into a list, or that are trained on one body late. They are reported where that is seen.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_lifecycle.copies import Hook
from hf_lifecycle.hosts.accelerate.intercept import models_of, optimizers_of

__all__ = ["Steps"]

logger = logging.getLogger("hf_lifecycle")

_IN_BODIES = (
    'train on each batch inside "for batch in manager.batches(loader)": do not collect the batches in a list, do not '
    "train one batch late, and do not iterate the loader directly"
)
_STANDS_STILL = (
    "manager.progress.step stays at %d, so a loop that waits for it to grow never ends: the optimizer steps outside a "
    "loop over manager.batches(), where steps are not counted: iterate manager.batches(loader), or "
    "manager.batches(range(steps)) if there is no loader"
)
_LEFT_OUT = (
    "maybe not exact: save() on a batch without an optimizer step: a resumed run continues with the next batch. "
    "That is right if the program skips this batch, such as for a NaN loss; otherwise call save() after "
    "optimizer.step(), or, if you accumulate gradients by hand, after the step that uses them"
)


class Steps:
    """Counts the steps of the optimizers that ``accelerator`` prepared.

    Args:
        accelerator: The loop's accelerator; optimizers that it prepares later are seen too.
        in_body: Whether the program is in the body of a batch.
    """

    def __init__(self, accelerator: Any, in_body: Callable[[], bool]) -> None:
        self._accelerator = accelerator
        self.in_body = in_body
        self._outside: Counter[int] = Counter()  # steps of each optimizer since the last batch, when it had no body
        self._batches = 0  # handed out in the loop over batches that is the last one
        self._before_batches = 0  # steps taken then
        self._is_over = True  # that loop
        self._told: set[str] = set()
        self._settled = 0
        self._stepped = False
        self._has_batch = False
        self._is_closed = False
        self._handles: list[Any] = []
        self._watched: list[Any] = []
        self._others: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # whether they train a model

    @property
    def count(self) -> int:
        """The steps taken, that on the batch at hand included once it is taken."""
        return self._settled + self.trained

    def read(self) -> int:
        """:attr:`count`, for the program, which is told where it takes steps that are not counted."""
        if not self._is_closed:
            self.watch()
            if max(self._outside.values(), default=0) > 1:
                self._tell_once(_STANDS_STILL % self.count, once_for=_STANDS_STILL)
        return self.count

    @property
    def trained(self) -> bool:
        """Whether an optimizer has stepped since the last batch was handed out."""
        return self._stepped or (self._has_batch and self._accelerator.sync_gradients and self._was_left_out())

    @property
    def knows(self) -> bool:
        """Whether the optimizers tell of their steps, so that a batch without one has not been trained on."""
        return bool(self._watched) and all(hasattr(one, "register_step_post_hook") for one in self._watched)

    def amid_accumulation(self) -> str | None:
        """Why a save loses gradients here, and where it does not; None if there are none to lose."""
        if self._accelerator.sync_gradients:
            return None
        count = self._accelerator.gradient_state.num_steps
        return (
            f"save() in the middle of an accumulation (batch {self._accelerator.step % count} of {count}), whose "
            "gradients are not saved: save where accelerator.sync_gradients is True"
        )

    def _was_left_out(self) -> bool:
        optimizers = optimizers_of(self._accelerator)
        scaled = any(optimizer.scaler is not None and optimizer.step_was_skipped for optimizer in optimizers)
        return scaled or (bool(optimizers) and not self.knows)

    def watch(self) -> None:
        """Listen to the optimizers there are now, and to those that are made later without being prepared."""
        if not self._handles:
            self._handles.append(register_optimizer_step_post_hook(self._note_other))
        for optimizer in optimizers_of(self._accelerator):
            inner = optimizer.optimizer
            if not any(inner is known for known in self._watched):
                self._watched.append(inner)
                if hasattr(inner, "register_step_post_hook"):
                    self._handles.append(inner.register_step_post_hook(Hook(self._note)))

    def _note(self, optimizer: Any, *_: Any) -> None:
        self._stepped = self._batches > 0
        if self.in_body():
            return
        self._outside[id(optimizer)] += 1
        if self._is_over and self._batches > 1 and self._settled - self._before_batches == self._batches - 1:
            self._tell("each batch is trained on after the next one was fetched, so a resumed run skips one batch")

    def _note_other(self, optimizer: Any, *_: Any) -> None:
        """Any optimizer of the process has stepped."""
        if any(optimizer is known for known in self._watched) or not self.in_body():
            return
        if optimizer not in self._others:
            ours = {id(one) for model in models_of(self._accelerator) for one in model.parameters()}
            held = (one for group in optimizer.param_groups for one in group["params"])
            self._others[optimizer] = not self._watched or any(id(one) in ours for one in held)
        self._stepped |= self._others[optimizer] and self._batches > 0

    def tell_at_save(self, *, before_step: bool) -> None:
        """A save is made: report where it cannot know on which batches training was, or will be after a resume."""
        self.watch()
        if max(self._outside.values(), default=0) > 1:
            self._tell(
                "the optimizer steps outside a loop over manager.batches(), so a save cannot know which "
                "batches were trained on"
            )
        if before_step:
            self._tell_once(_LEFT_OUT)

    def _tell(self, what: str) -> None:
        self._tell_once(f"not exact: {what}: {_IN_BODIES}")

    def _tell_once(self, what: str, *, once_for: str = "") -> None:
        if (told := once_for or what) not in self._told:
            self._told.add(told)
            logger.warning("%s", what)

    def settle(self, *, has_batch: bool = False) -> int:
        """Count the step on the batch at hand, which is done with. ``has_batch``: another one is handed out.

        Returns the steps taken.
        """
        self._settled = self.count
        self._stepped, self._has_batch = False, has_batch
        if has_batch:
            if self._is_over:
                self._batches, self._before_batches, self._is_over = 0, self._settled, False
            self._batches += 1
            self._outside.clear()
        else:
            self._is_over = not self.in_body()
        return self._settled

    def set(self, count: int) -> None:
        """Go on from a count that was saved, when all is loaded. torch may step to make the state it loads into."""
        self._outside.clear()
        self._settled, self._stepped, self._has_batch = count, False, False

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched, self._is_closed = [], [], True
