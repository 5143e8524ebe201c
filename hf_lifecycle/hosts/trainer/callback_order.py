"""Other code at a save: what may read the checkpoint finds it.

A checkpoint has its name when the save returns, and a save in the background is waited for where anybody may look
before it is written. Code that looks for checkpoints at any other event is known by what it names: the function that
finds the last one, the start of their names.
"""

from __future__ import annotations

import functools
from types import CodeType, FunctionType
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_lifecycle.bytecode import names_in, operands_of
from hf_lifecycle.hosts.trainer.after_event import LastToHear, hears
from hf_lifecycle.hosts.trainer.intercept import SAVE, reads_checkpoint
from hf_lifecycle.hosts.trainer.saves.withheld import overrides_that_run_on
from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.state.reachable import attributes_of
from hf_lifecycle.state.values.functions import functions_in

__all__ = ["readers"]

_FINDS = frozenset({"best_model_checkpoint", "get_last_checkpoint", "latest_checkpoint", "PREFIX_CHECKPOINT_DIR"})
_DEEPEST = 3
_BEGINS = f"{PREFIX_CHECKPOINT_DIR}-"


def readers(trainer: Any, part: Any) -> list[str]:
    """Whose code may look at the checkpoint when Trainer has saved it, beside the callback that ``part`` is of."""
    every = (one for one in trainer.callback_handler.callbacks if type(one) is not LastToHear)
    others = [one for one in every if part not in attributes_of(one).get("_parts", ())]
    hearing = (one for one in others if hears(one, "on_save"))
    found = [f"{type(one).__name__}.on_save" for one in hearing if reads_checkpoint(one) is not False]
    found += [f"{name}.{SAVE}" for name in overrides_that_run_on(trainer)]
    kinds: list[Any] = [type(one) for one in (trainer, *others)]
    looking = (name for kind in kinds for name in _looking(kind))
    return found + [name for name in looking if name not in found and not name.endswith(f".{SAVE}")]


@functools.cache
def _looking(kind: type) -> list[str]:
    """The methods of a class of the user's that look for checkpoints."""
    own = [(name, one) for base in kind.__mro__ if is_of_user(base) for name, one in vars(base).items()]
    finding = (name for name, one in own if any(_finds(each) for each in functions_in(one)))
    return sorted({f"{kind.__name__}.{name}" for name in finding})


def _finds(function: FunctionType, depth: int = 0) -> bool:
    """Whether a function, or one of the user's that it calls, names what finds checkpoints."""
    code = function.__code__
    if _FINDS & {*names_in(code), *code.co_freevars} or _has_beginning(code):
        return True
    called = (function.__globals__.get(name) for name in operands_of(code, "LOAD_GLOBAL")) if depth < _DEEPEST else ()
    return any(_finds(one, depth + 1) for one in called if type(one) is FunctionType and is_of_user(one))


def _has_beginning(code: CodeType) -> bool:
    texts = (one for one in code.co_consts if isinstance(one, str))
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return any(_BEGINS in one for one in texts) or any(map(_has_beginning, inner))
