"""What a user's code sees of an object of ours that stands in the place of one of its own in a loader.

A callback asks ``train_dataloader.dataset`` for its class, and sets attributes of ``train_dataloader.collate_fn``.
"""

from __future__ import annotations

import copy
from multiprocessing.context import get_spawning_popen
from typing import Any

__all__ = ["Collation", "Made", "class_within"]


def _class_within(one: Any) -> type:
    within = object.__getattribute__(one, "__dict__").get("inner")
    return type(one) if within is None else within.__class__


class_within: Any = property(_class_within)
"""To be ``__class__``: ``isinstance`` finds our own class, as before, and the class of what is in ``inner``."""


class Collation:
    """The ``collate_fn`` of a loader under streams: what collates is called by the dataset, or through it.

    Attributes and class are those of the user's own. Which of these collates is the dataset's to say.
    """

    __class__ = class_within

    def __init__(self, stream: Any) -> None:
        object.__setattr__(self, "inner", stream.inner_collate)
        object.__setattr__(self, "_stream", stream)

    def __call__(self, batch: Any) -> Any:
        return self._stream.run_collate(batch)

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "_stream") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if get_spawning_popen() is not None:
            return Collation, (self._stream,)  # to a worker
        return copy.copy, (self.inner,)


class Made(list[Any]):
    """The items of a batch, and the batch: a user may give the loader another ``collate_fn`` in place of ours."""

    def __init__(self, items: list[Any], batch: Any) -> None:
        super().__init__(items)
        self.batch = batch

    @classmethod
    def of(cls, items: Any, batch: Any) -> Any:
        """Both; the batch alone where the items are no list."""
        return cls(items, batch) if type(items) is list else batch
