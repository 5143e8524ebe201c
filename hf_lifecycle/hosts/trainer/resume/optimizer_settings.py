"""Settings of the optimizer that come back with its state, so that changing them between two starts has no effect.

``load_state_dict`` of an optimizer brings back the settings of every group, and that of a scheduler its first learning
rates. The resumed run is the one that was begun, bit for bit; a user who meant to change it has to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from hf_lifecycle.state.environment import Difference, Grade

__all__ = ["keep_groups", "without_effect"]

_OF_OPTIMIZER = frozenset({"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"})
_MAKE_ANOTHER = frozenset({"optim", "optim_args", "optim_target_modules"})


def without_effect(
    arguments: Sequence[Difference],
    made: Callable[[], list[Difference]],
    readers: Callable[[frozenset[str]], list[str]],
    keeps_rates: Callable[[], bool],
) -> list[Difference]:
    """The differences of arguments, with those that have no effect graded so, and what else the optimizer is made with.

    Args:
        made: Gives what differs in what the optimizer was made with, and was undone by loading its state.
        readers: Gives the classes of the user's that read one of some arguments.
        keeps_rates: Tells whether the schedule does without the present ``learning_rate``.
    """
    changed = {one.name for one in arguments}
    if not changed & (_OF_OPTIMIZER | _MAKE_ANOTHER):
        return [*arguments, *made()]
    without = {name for name in changed & _OF_OPTIMIZER if not readers(frozenset({name}))}
    if "learning_rate" in without and not keeps_rates():
        without.remove("learning_rate")
    return [replace(one, grade=Grade.NO_EFFECT) if one.name in without else one for one in arguments]


def keep_groups(optimizer: Any) -> Callable[[Any], Any]:
    """Let who holds the groups of an optimizer have them after loading, when the function returned is called.

    torch's ``load_state_dict`` makes new ones: a schedule that keeps ``optimizer.param_groups`` would set learning
    rates that no step reads. An optimizer with one of its own may keep its groups elsewhere too, and is left alone.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    is_torchs = isinstance(inner, Optimizer) and type(inner).load_state_dict is Optimizer.load_state_dict
    held = inner.param_groups if is_torchs else None
    groups = list(held or ())

    def put_back(result: Any) -> Any:
        loaded = inner.param_groups if held is not None else None
        if held is None or loaded is None or loaded is held or len(loaded) != len(groups):
            return result
        for own, new in zip(groups, loaded, strict=True):
            settings = dict(new)
            own.clear()
            own.update(settings)
        held[:] = groups
        inner.param_groups = held
        return result

    return put_back
