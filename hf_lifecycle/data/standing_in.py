"""What a user's code sees of an object of ours that stands in the place of one of its own in a loader.

A callback asks ``train_dataloader.dataset`` for its class, and sets attributes of ``train_dataloader.collate_fn``.
"""

from __future__ import annotations

import copy
from multiprocessing.context import get_spawning_popen
from typing import Any, ClassVar

__all__ = ["Collation", "Made", "StandIn"]


def _class_within(one: Any) -> type:
    within = object.__getattribute__(one, "__dict__").get("inner")
    return type(one) if within is None else within.__class__


class StandIn:
    """Whoever reads or sets an attribute that is not of ``_OWN``, or copies it, gets to what is ``inner``."""

    _OWN: ClassVar[frozenset[str]]
    __class__: Any = property(_class_within)  # isinstance finds our own class, as before, and that of what is inside
    inner: Any

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "_stream") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if get_spawning_popen() is not None:
            return _made, (type(self), dict(vars(self)))  # to a worker
        return copy.copy, (self.inner,)  # a copy is one of what is inside


def _made(kind: type[StandIn], held: dict[str, Any]) -> StandIn:
    one = object.__new__(kind)
    vars(one).update(held)
    return one


class Collation(StandIn):
    """The ``collate_fn`` of a loader under streams: what collates is called by the dataset, or through it.

    Attributes and class are those of the user's own. Which of these collates is the dataset's to say.
    """

    _OWN = frozenset({"inner", "_stream"})

    def __init__(self, stream: Any) -> None:
        self.inner, self._stream = stream.inner_collate, stream

    def __call__(self, batch: Any) -> Any:
        return self._stream.run_collate(batch)


class Made(list[Any]):
    """The items of a batch, and the batch: a user may give the loader another ``collate_fn`` in place of ours."""

    def __init__(self, items: list[Any], batch: Any) -> None:
        super().__init__(items)
        self.batch = batch

    @classmethod
    def of(cls, items: Any, batch: Any) -> Any:
        """Both; the batch alone where the items are no list."""
        return cls(items, batch) if type(items) is list else batch
