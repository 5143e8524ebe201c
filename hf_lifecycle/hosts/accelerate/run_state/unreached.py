"""What changes while a loop runs and is in no checkpoint is named, once.

Modules that only a variable of the program holds, such as an average of the weights, and optimizers that step for
parameters that nobody prepared cannot be given their state: nothing tells one of them from another in the next process.
They are seen to change: modules from the loop's beginning or the first save on, optimizers as they step. Quiet is what
does not change, and an optimizer that is made for one batch.

A resumed run begins without gradients. Those that a program leaves standing and zeroes before the next backward pass
decide nothing, so one parameter of each model is looked at when its next gradient comes.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_lifecycle.copies import Hook
from hf_lifecycle.messages import few
from hf_lifecycle.saving.carrying import sample_of
from hf_lifecycle.state.alive import modules_beside, tensors_of
from hf_lifecycle.state.gathering import is_dense
from hf_lifecycle.torch_internals import storage_id

__all__ = ["KeptGradients", "Unreached"]

logger = logging.getLogger("hf_lifecycle")


class Unreached:
    """Watches one loop.

    Args:
        known: Gives everything that is saved, or that was named already.
        place: Gives what differs from batch to batch.
    """

    def __init__(self, known: Callable[[], Iterable[Any]], place: Callable[[], Any], way_on: str) -> None:
        self._known = known
        self._place = place
        self._way_on = way_on
        self._modules: list[tuple[weakref.ref[torch.nn.Module], str]] = []  # with their marks
        self._passed: set[int] = set()  # optimizers that are known, or were named
        self._stepped: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # at which place, of the rest
        self._has_looked_again = False
        self._handle: Any = None

    def begin(self) -> None:
        """The loop begins."""
        if self._handle is not None:
            return
        known = list(self._known())
        self._passed = {id(one) for one in known}
        self._modules = [(weakref.ref(one), _sample(one, self._passed)) for one in modules_beside(known)]
        note = weakref.WeakMethod(self._note)  # torch keeps the hook as long as the process lives

        def hook(optimizer: Any, *_: Any) -> None:
            noted = note()
            if noted is not None:
                noted(optimizer)

        self._handle = register_optimizer_step_post_hook(hook)
        weakref.finalize(self, self._handle.remove)

    def _note(self, optimizer: Any) -> None:
        if id(optimizer) in self._passed:
            return
        place = self._place()
        if self._stepped.setdefault(optimizer, place) == place:
            return
        self._passed = {id(one) for one in self._known()} | {id(optimizer)}
        if any(optimizer is one for one in self._known()):
            return
        logger.warning(
            "not exact: %s steps, but was not passed to accelerator.prepare(), so a resumed run starts with its "
            "initial state: prepare it, or pass it and what it trains as objects=",
            _article(type(optimizer).__name__),
        )

    def check(self, stored: Iterable[torch.Tensor] | None = None) -> None:
        """A save is made: name the modules that have changed since the loop began.

        Args:
            stored: Tensors that the program stores itself. If there are any of the modules among them, only then is
                the rest named: it may be stored elsewhere.
        """
        held = list(self._known())
        known = {id(one) for one in held}
        if not self._has_looked_again:
            self._has_looked_again = True
            watched_now = {id(reference()) for reference, _ in self._modules}
            late = [one for one in modules_beside(held) if id(one) not in watched_now]
            self._modules += [(weakref.ref(one), _sample(one, known)) for one in late]
        if stored is not None:
            places = {storage_id(one) for one in stored if is_dense(one)}
            own = [one for reference, _ in self._modules if (one := reference()) is not None and _lies_in(one, places)]
            if not own:
                return
            known |= {id(one) for module in own for one in (module, *tensors_of(module))}
        watched = [(module, mark) for reference, mark in self._modules if (module := reference()) is not None]
        changed = [one for one, mark in watched if id(one) not in known and _sample(one, known) != mark]
        if changed:
            told = {id(one) for one in changed}
            self._modules = [(weakref.ref(one), mark) for one, mark in watched if id(one) not in told]
            logger.warning(
                "not exact: %s changes during training, but was not passed to accelerator.prepare(), so a resumed "
                "run starts with its initial state: %s",
                few([_article(type(one).__name__) for one in changed], ", "),
                self._way_on,
            )

    def close(self) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._modules = None, []


def _sample(module: torch.nn.Module, known: set[int]) -> str:
    """Of the tensors that are not saved already."""
    return sample_of(one for one in tensors_of(module) if id(one) not in known and is_dense(one))


def _lies_in(module: torch.nn.Module, storages: set[int]) -> bool:
    return all(storage_id(one) in storages for one in tensors_of(module) if is_dense(one))


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "AEIOU" else f"a {kind}"


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
