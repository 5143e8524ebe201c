"""Trainer's own saving, intercepted: for which trainers, and what it does not write itself in a save that is captured.

Promise: :func:`learned_rng_file` names that file only where what Trainer has just written is, byte for byte, what
:func:`rng_states` gives. Accelerators that this does not know of are left to Trainer.

A subclass that has a ``_save_checkpoint`` of its own reaches Trainer's by ``super()``, which no attribute of an object
can intercept. So the method of the class is replaced, once, by one that does for all others what it did. Trainers are
known by weak reference: a copy of one is another trainer, and none is kept alive.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import random
import textwrap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from hf_lifecycle.hosts.trainer.intercept import SAVE, SAVE_OPTIMIZER, SAVE_RNG
from hf_lifecycle.hosts.trainer.method_patching import overridden, replaced
from hf_lifecycle.hosts.trainer.saves.deferred import DeferredFiles
from hf_lifecycle.saving.files.archive import TorchArchive
from hf_lifecycle.saving.files.checkpoint_files import require_archive
from hf_lifecycle.saving.files.layout import NotLearned

__all__ = [
    "around_own_save",
    "learned_rng_file",
    "overrides_that_run_on",
    "rng_states",
    "scheduler_file",
    "step_follows",
    "withheld",
]


def rng_states(args: TrainingArguments) -> dict[str, Any]:
    """The states of the generators as ``Trainer._save_rng_state`` has them; nobody else has these objects."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        of_all = args.parallel_mode == ParallelMode.DISTRIBUTED
        states["cuda"] = torch.cuda.random.get_rng_state_all() if of_all else torch.cuda.random.get_rng_state()
    return states


def learned_rng_file(trainer: Any, folder: Path) -> str | None:
    """What the file of this process is called, looked at right after Trainer has written it into ``folder``.

    Returns:
        The name; None where Trainer wrote none, or another than would be written here.
    """
    args = trainer.args
    name = "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
    if overridden(trainer, [SAVE_RNG]):
        return None
    try:
        require_archive(folder / name, rng_states(args))
    except (NotLearned, FileNotFoundError):
        return None
    return name


@contextmanager
def withheld(
    trainer: Any,
    rng_file: str | None,
    captured: Callable[[], DeferredFiles | None],
    **methods: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """While Trainer saves, let it write neither optimizer nor ``trainer_state.json`` once the save is captured.

    Args:
        rng_file: Its file of random numbers, if the captured save is to have it.
        captured: Gives the save as soon as it is captured.
        methods: What else of the trainer's is replaced, as for
            :func:`~hf_lifecycle.hosts.trainer.method_patching.replaced`.
    """

    def unless_captured(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: own(*given, **named) if captured() is None else None

    def rng_captured(own: Callable[..., Any]) -> Callable[..., Any]:
        def method(output_dir: str) -> None:
            save = captured()
            if save is None:
                own(output_dir)
            else:
                save.rng = rng_states(trainer.args)

        return method

    instead = {SAVE_OPTIMIZER: unless_captured, **methods}
    if rng_file is not None:
        instead[SAVE_RNG] = rng_captured
    with replaced(trainer, **instead), replaced(trainer.state, save_to_json=unless_captured):
        yield


def scheduler_file(trainer: Any) -> TorchArchive:
    """Of the schedule as it is now: a learning rate may be a tensor, which the next step changes."""
    return TorchArchive(copy.deepcopy(trainer.lr_scheduler.state_dict()), "scheduler")


def step_follows(trainer: Any, state: TrainerState) -> bool:
    """Else there is nothing for a copy to overlap with, and nothing to make up for a torn snapshot by."""
    return state.global_step < state.max_steps and not trainer.control.should_training_stop


_Wrapper = Callable[[Any, Callable[[], object]], None]
# By the identity of each trainer, which may have no hash, with a reference to it.
# Invariant: no strong reference to what leads to the trainer, which would keep it for ever.
_around: dict[int, tuple[weakref.ref[Any], weakref.WeakMethod[_Wrapper]]] = {}


def around_own_save(trainer: Any, wrapper: _Wrapper) -> Callable[[], None] | None:
    """Let ``wrapper(trainer, save)`` run instead of Trainer's own ``_save_checkpoint``, with ``save`` doing it.

    ``wrapper`` is a method, whose object the caller keeps.

    Returns what ends that; None where there is no such method.
    """
    if trainer is None or not hasattr(Trainer, SAVE):
        return None
    _install()
    key = id(trainer)
    mine = weakref.ref(trainer, lambda _: _around.pop(key, None)), weakref.WeakMethod(wrapper)
    _around[key] = mine

    def stop() -> None:
        if _around.get(key) is mine:
            del _around[key]

    return stop


def _install() -> None:
    own = getattr(Trainer, SAVE)
    if getattr(own, "of_hf_lifecycle", False):
        return

    @functools.wraps(own)
    def method(self: Any, *given: Any, **named: Any) -> Any:
        known, wrapping = _around.get(id(self), (None, None))
        wrapper = wrapping() if known is not None and wrapping is not None and known() is self else None
        if wrapper is None:
            return own(self, *given, **named)
        return wrapper(self, functools.partial(own, self, *given, **named))

    method.of_hf_lifecycle = True  # type: ignore[attr-defined]
    setattr(Trainer, SAVE, method)


def overrides_that_run_on(trainer: Any) -> list[str]:
    """The classes whose ``_save_checkpoint`` may look at the checkpoint when Trainer's own has returned."""
    found = [kind for kind in type(trainer).__mro__ if kind is not Trainer and SAVE in vars(kind)]
    names = [kind.__name__ for kind in found if not _ends_with_super(vars(kind)[SAVE])]
    return names + (["an attribute of the trainer"] if SAVE in vars(trainer) else [])


def _ends_with_super(method: Any) -> bool:
    """Whether ``super()._save_checkpoint(...)`` is the last that a method does, as its source says."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return False
    function = tree.body[0] if tree.body else None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return False
    last = function.body[-1]
    value = last.value if isinstance(last, (ast.Expr, ast.Return)) else None
    return _is_super_call(value) and sum(_is_super_call(node) for node in ast.walk(function)) == 1


def _is_super_call(node: Any) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == SAVE):
        return False
    owner = node.func.value
    return isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"
