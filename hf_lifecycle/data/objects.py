"""Objects that take part in making batches and keep a state: a dataset, a collator, a sampler, a transform in one.

Promise: what the user named and what has ``state_dict()`` and ``load_state_dict()`` of its own is found, in the process
that trains as in a worker, and its state is copied and given back. Not looked at: the classes of torch, torchdata,
accelerate, transformers and datasets, whose place in an epoch is found otherwise; a trainer, and what it holds.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from hf_lifecycle.data.generators import reachable
from hf_lifecycle.libraries import library_of, module_of

__all__ = [
    "DataObjects",
    "States",
    "Unreadable",
    "find_in",
    "find_making_and_drawing",
    "name_given",
    "read_state",
    "same_state",
]

logger = logging.getLogger("hf_lifecycle")

States = dict[str, Any]
_LEVELS = 6
_GIVEN = "objects: "  # before the names of those that the user named
_PLAIN = (str, bytes, int, float, complex, bool, type(None), np.ndarray, torch.Tensor, type, ModuleType)
_LIBRARIES = ("torch", "torchdata", "accelerate", "transformers", "datasets")
_HOSTS = frozenset({"transformers.trainer", "accelerate.accelerator"})


class DataObjects:
    """Some objects by name, and their states.

    Args:
        members: The objects. In a worker they are its copies, where they came with the dataset that they belong to.
    """

    def __init__(self, members: Mapping[str, Any]) -> None:
        self.members = dict(members)
        self.unreadable: list[str] = []  # of which a state was found at first

    def __bool__(self) -> bool:
        return bool(self.members)

    def states(self) -> States:
        """The states as they are now; nothing that happens later changes them."""
        states = {}
        for name, one in list(self.members.items()):
            state = read_state(one)
            if not isinstance(state, Unreadable):
                states[name] = state
            elif name_given(name) is None:  # a save raises it again where the user named the object
                self.leave_out([name])
                logger.warning("%s: its state is not saved: %s", name, state.reason)
        return states

    def leave_out(self, names: Collection[str]) -> None:
        """From now on, take no notice of those."""
        self.unreadable += [name for name in names if self.members.pop(name, None) is not None]

    def load(self, states: Mapping[str, Any]) -> None:
        """Give each its state."""
        for name, state in states.items():
            if name in self.members:
                self.members[name].load_state_dict(copy.deepcopy(state))

    def become(self, states: Mapping[str, Any]) -> None:
        """Give those their state that have another. Many an object takes what it is given for where it begins next."""
        now = self.states()
        self.load({name: state for name, state in states.items() if name in now and not same_state(now[name], state)})


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why an object has given no state."""

    reason: str


def read_state(item: Any) -> Any:
    """The state of ``item``, which nothing changes later; :class:`Unreadable` where it gives none.

    What a class of the user's raises that was not asked for its state, as one that wants arguments, must not end a
    training that can do without.
    """
    try:
        return copy.deepcopy(item.state_dict())
    except Exception as error:  # noqa: BLE001 - of any kind, since it is the user's
        return Unreadable(f"its state_dict() raised {type(error).__name__}: {error}")


def same_state(one: Any, other: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same_state, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return type(one) is type(other) and (repr(one) == repr(other) if isinstance(one, float) else bool(one == other))


def name_given(path: str) -> str | None:
    """By which name the user gave an object, or None where nobody named it."""
    return path.removeprefix(_GIVEN) if path.startswith(_GIVEN) else None


def find_data_objects(
    roots: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    leave_out: Collection[int] = (),
    refusal: Callable[[Any], str | None] = lambda state: None,  # noqa: ARG005
) -> tuple[dict[str, Any], dict[str, str]]:
    """The objects with a state that are reachable from ``roots``.

    Args:
        leave_out: What ``id()`` says of objects that are not looked for.
        refusal: Why a state that an object gave cannot be kept, or None.

    Returns:
        The objects by name, and why others, which nobody named, cannot be kept.
    """
    names = {id(item): name for name, item in given.items()}
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    seen = set(leave_out)
    for root, value in roots.items():
        for path, item in _reachable(value, root):
            if id(item) in seen:
                continue
            if id(item) in names:
                found[_GIVEN + names[id(item)]] = item
            elif _keeps_state(item):
                state = read_state(item)
                reason = state.reason if isinstance(state, Unreadable) else refusal(state)
                if reason is None:
                    found[path] = item
                else:
                    refused[path] = reason
            seen.add(id(item))
    return found, refused


def find_in(loader: Any, given: Mapping[str, Any], refusal: Callable[[Any], str | None]) -> tuple[Any, dict[str, str]]:
    """What keeps a state of a loader that nobody knows, itself included; and what is refused."""
    found, refused = find_data_objects({"loader": loader}, given, refusal=refusal)
    return DataObjects(found), refused


def find_making_and_drawing(
    dataset: Any, sampler: Any, given: Mapping[str, Any], refusal: Callable[[Any], str | None]
) -> tuple[DataObjects, DataObjects, dict[str, str]]:
    """What keeps a state of that which makes batches, and of that which decides their order; and what is refused.

    Args:
        dataset: A loader's dataset under a stream.
        sampler: Its order under a stream, or None.
    """
    roots = {"dataset": dataset.inner, "collate_fn": dataset.inner_collate}
    making, refused = find_data_objects(roots, given, refusal=refusal)
    if sampler is None:
        return DataObjects(making), DataObjects({}), refused
    # A sampler holds the dataset more often than not.
    known = [id(item) for root, value in roots.items() for _, item in _reachable(value, root)]
    drawing, more = find_data_objects({"sampler": sampler.inner}, given, leave_out=known, refusal=refusal)
    return DataObjects(making), DataObjects(drawing), refused | more


def _reachable(root: Any, name: str) -> Iterator[tuple[str, Any]]:
    return reachable(root, name, levels=_LEVELS, passed_over=_passed_over, ends=torch.nn.Module)


def _passed_over(value: Any) -> bool:
    return issubclass(type(value), _PLAIN) or _is_host(value)


def _is_host(value: Any) -> bool:
    """Whether it is a trainer, an accelerator or an optimizer, to which a bound method as a collator leads."""
    modules = {kind.__module__ for kind in type(value).__mro__}
    return bool(modules & _HOSTS) or any(module.startswith("torch.optim") for module in modules)


def _keeps_state(item: Any) -> bool:
    if issubclass(type(item), torch.nn.Module) or library_of(module_of(type(item))) in _LIBRARIES:
        return False
    # Asked of the class: what an object makes of a request for a name that it may not have is its own affair.
    return all(callable(getattr(type(item), name, None)) for name in ("state_dict", "load_state_dict"))
