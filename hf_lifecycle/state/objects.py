"""The user's own objects that are saved and restored with a run, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from hf_lifecycle.argument_checks import given
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.fingerprint import tree_digest

__all__ = ["Stateful", "absent_objects", "check_objects", "left_to_rank_0", "restore_objects", "states_to_save"]


class Stateful(Protocol):
    """Anything whose state can be taken and given back: a module, an optimizer, an EMA."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


def check_objects(objects: Mapping[str, Stateful]) -> None:
    """Raise ``TypeError`` for what is no mapping, a name that is no string, or an object without a state."""
    if not isinstance(objects, Mapping):
        raise TypeError(f"objects must be a mapping of names to objects, got {given(objects)}")
    for name, item in objects.items():
        if not isinstance(name, str):
            raise TypeError(f"objects: names must be strings, got {name!r}")
        if isinstance(item, type):
            raise TypeError(f"objects[{name!r}]: {item.__qualname__} is a class; pass an instance")
        if not (callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))):
            raise TypeError(f"objects[{name!r}]: a {type(item).__qualname__} has no state_dict() and load_state_dict()")


def states_to_save(objects: Mapping[str, Stateful], travelled: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The state of every object; of those in ``travelled`` the one from there, since they are ahead of training."""
    return {name: dict(travelled[name] if name in travelled else one.state_dict()) for name, one in objects.items()}


def left_to_rank_0(states: Mapping[str, Any], ranks: Ranks) -> list[str]:
    """The names of those whose states rank 0 has alike, which it alone writes; on rank 0 none. All ranks call it.

    It is decided by digests of live states, here and now: to digest one takes a fraction of the time of the copy that a
    thread would need, which could do it later.
    """
    if ranks.world_size == 1:
        return []
    own = {name: tree_digest(state) for name, state in states.items()}
    theirs = ranks.broadcast(own, what="the digests of the objects")
    return [] if ranks.is_main else [name for name, digest in own.items() if digest == theirs.get(name)]


def restore_objects(objects: Mapping[str, Stateful], saved: Mapping[str, Any]) -> list[str]:
    """Give every object the state saved under its name. Returns a sentence for each name that one side lacks."""
    for name in objects.keys() & saved.keys():
        objects[name].load_state_dict(saved[name])
    return absent_objects(objects, saved)


def absent_objects(objects: Mapping[str, Stateful], saved: Mapping[str, Any]) -> list[str]:
    """A sentence for each name that only one side has."""
    new = [f"objects: {name!r} has no saved state" for name in objects if name not in saved]
    return new + [f"objects: {name!r} was saved, but is not given now" for name in saved if name not in objects]
