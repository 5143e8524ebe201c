"""The loaders that were not prepared: those that the functions which call hold in variables, by the names of these.

Promise: a loader has the same name in every process of the same program. Looked at are local variables, the variables
of modules that the functions name, and what objects of the user's own, dicts and lists in these hold. Not seen: what
is made later, or held elsewhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from hf_lifecycle.bytecode import names_in
from hf_lifecycle.libraries import is_of_user, lies_with_user
from hf_lifecycle.state.loop_code import asking_frame
from hf_lifecycle.state.reachable import attributes_of

__all__ = ["PlainLoaders"]

_MOST = 512  # of a list or a dict


class PlainLoaders:
    """Those of one run.

    Args:
        prepared: Gives the loaders that are prepared.
    """

    def __init__(self, prepared: Callable[[], Iterable[Any]]) -> None:
        self._prepared = prepared
        self._found: dict[str, weakref.ref[Any]] | None = None
        self._asked: set[str] = set()

    def look(self) -> None:
        """Look for them, once."""
        if self._found is None:
            prepared = [each for one in self._prepared() for each in (one, getattr(one, "base_dataloader", None))]
            passed = set(map(id, prepared))
            self._found = {}
            for name, one in _held_by_program():
                if id(one) not in passed:
                    passed.add(id(one))
                    self._found.setdefault(name, weakref.ref(one))

    def all(self) -> dict[str, Any]:
        """Every one that lives, by its name."""
        every = {name: reference() for name, reference in (self._found or {}).items()}
        return {name: one for name, one in every.items() if one is not None}

    def ask(self, loader: Any) -> None:
        """The loop goes through this loader."""
        self._asked |= {name for name, one in self.all().items() if one is loader}

    def asked(self) -> dict[str, Any]:
        """Those that the loop has gone through."""
        return {name: one for name, one in self.all().items() if name in self._asked}

    def is_asked(self, path: str) -> bool:
        """Whether a path is not within one that the loop has not gone through."""
        return not any(path.startswith(f"{name}.") for name in self.all().keys() - self._asked)


def _held_by_program() -> Iterator[tuple[str, Any]]:
    """What the functions that call hold; the outermost first, which calls wherever the package is called."""
    frame: FrameType | None = asking_frame()
    frames = []
    while frame is not None:
        if lies_with_user(str(frame.f_globals.get("__name__"))):
            frames.append(frame)
        frame = frame.f_back
    for one in reversed(frames):
        named = names_in(one.f_code)
        held = {name: value for name, value in one.f_globals.items() if name in named} | one.f_locals
        for name, value in held.items():
            yield from _within(name, value, 0)


def _within(name: str, one: Any, depth: int) -> Iterator[tuple[str, Any]]:
    kind = type(one)
    if issubclass(kind, DataLoader):
        yield name, one
    elif depth == 0 and kind is dict:
        for key in list(one)[:_MOST]:
            yield from _within(f"{name}[{key}]", one[key], 1)
    elif depth == 0 and kind in (list, tuple):
        for number, each in enumerate(one[:_MOST]):
            yield from _within(f"{name}[{number}]", each, 1)
    elif depth == 0 and not issubclass(kind, type) and is_of_user(kind):
        for key, each in list(attributes_of(one).items()):
            yield from _within(f"{name}.{key}", each, 1)
