"""Where a value is, so that it can be seen again and set: an attribute, an item, a variable.

Promise: no method of a user's class is called, whatever it makes of a request for an attribute or an item.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

from hf_lifecycle.state.reachable import attributes_of
from hf_lifecycle.state.values.marks import mark_of
from hf_lifecycle.state.values.trees import NotPlain

__all__ = ["Place", "newly_shared"]

_WITH_ITEMS = (OrderedDict, dict, list)


@dataclass(slots=True)  # not frozen, which takes three times as long to make
class Place:
    """An attribute, an item, a variable of a closure, of a module or of a context.

    Attributes:
        holder: The object, class, function, container, cell or variable of a context that holds it.
        key: Its name or index there; of a function the number of a default.
        path: That of the holder.
    """

    holder: Any
    key: Any
    path: str

    def get(self) -> Any:
        """The value; ``KeyError``, ``IndexError`` or ``ValueError`` where there is none."""
        kind = type(self.holder)
        if kind is CellType:
            return self.holder.cell_contents
        if kind is FunctionType and type(self.key) is int:
            return (self.holder.__defaults__ or ())[self.key]
        if kind is ContextVar:
            return self.holder.get(None)
        for base in _WITH_ITEMS:
            if issubclass(kind, base):
                return base.__getitem__(self.holder, self.key)
        return attributes_of(self.holder)[self.key]

    def mark(self) -> Any:
        """What differs where the value was changed; None where there is none."""
        try:
            return mark_of(self.get())
        except (KeyError, IndexError, ValueError, NotPlain):
            return None

    def put(self, value: Any) -> None:
        """Set the value."""
        kind = type(self.holder)
        if kind is CellType:
            self.holder.cell_contents = value
        elif kind is FunctionType and type(self.key) is int:
            defaults = list(self.holder.__defaults__ or ())
            defaults[self.key] = value
            self.holder.__defaults__ = tuple(defaults)
        elif kind is ContextVar:
            self.holder.set(value)
        elif issubclass(kind, type):
            setattr(self.holder, self.key, value)
        else:
            base: Any = next((one for one in _WITH_ITEMS if issubclass(kind, one)), None)
            if base is None:
                attributes_of(self.holder)[self.key] = value
            else:
                base.__setitem__(self.holder, self.key, value)


def newly_shared(
    now: Mapping[str, tuple[Place, str]], first: Mapping[str, str], saved: Container[str]
) -> dict[str, dict[str, Any]]:
    """What is to be saved of the places that hold what another place holds, and did not at ``first``.

    Args:
        now: Of each path the place, and the path of the other one.
        first: Of each path the other one, as it was at first.
        saved: The paths of what is saved; loading may have parted what is held in one of them.
    """
    return {
        path: {"within": place.path, "key": place.key, "value": other, "late": True, "bound": None}
        for path, (place, other) in now.items()
        if other in saved or first.get(path) != other
    }
