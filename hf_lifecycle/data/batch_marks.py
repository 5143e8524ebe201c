"""What the batches that were made ahead are like, so that a resumed run knows whether its next batch is the same.

Loaders are ahead of training: the batch that follows on a save is mostly there already. Its mark is saved, and compared
with that of the batch which the resumed run gets in its place.

Promise: where a difference is found, the two batches differ. Not promised: that each difference is found. Of a large
tensor only some elements are looked at, of a batch only tensors and arrays in host memory, and after the last batch of
a pass nothing was made ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from hf_lifecycle.data.stream_position import token_of

__all__ = ["BatchMarks", "mark_of"]

_ALL = 16 << 10  # bytes of a tensor up to which all of it is looked at
_SOME = 512  # about so many elements of a larger one
_TENSORS = 32  # of a batch
_LEVELS = 4
_WORDS = {  # of which NumPy has none
    torch.bfloat16: torch.int16,
    torch.complex32: torch.int32,
    **{
        kind: torch.uint8
        for name in dir(torch)
        if name.startswith(("float8", "float4"))
        for kind in [getattr(torch, name)]
    },
}


class BatchMarks:
    """Marks of the batches that have come and that training has not passed yet.

    Args:
        workers: Of a stream, whose workers count their batches each for itself; 0: batches are numbered in their order.

    Attributes:
        races: Whether a batch was made of random numbers that threads draw at the same time.
    """

    def __init__(self, workers: int) -> None:
        self.token = token_of(self)
        self._workers = workers
        self._epoch = -1
        self._marks: dict[int, str] = {}
        self._expected: tuple[int, str] | None = None
        self._resumed: tuple[int, str] | None = None
        self._differs = False
        self.races = False

    def add(self, epoch: int, worker: int, number: int, mark: str, races: bool = False) -> None:
        """A batch has come."""
        self.races = self.races or races
        # Invariant: read before the epoch is looked at, as in TrackedObjects.add.
        marks = self._marks
        if epoch != self._epoch:
            return
        place = number * max(self._workers, 1) + worker
        marks[place] = mark
        if self._expected is not None and self._expected[0] == place:
            self._differs, self._expected = self._expected[1] != mark, None

    def begin(self, epoch: int) -> None:
        """A pass is about to begin, at its first batch or where a run is resumed."""
        self._epoch, self._marks = epoch, {}
        self._expected, self._resumed = self._resumed, None

    def trained(self, count: int) -> bool:
        """``count`` batches of the pass were trained on. Returns, once, whether the first of a resumed run differs."""
        marks = self._marks
        for place in [place for place in list(marks) if place < count]:
            del marks[place]
        differs, self._differs = self._differs, False
        return differs

    def state_dict(self, count: int | None) -> dict[str, Any]:
        """The mark of the batch that follows on ``count`` batches; None: the pass is over."""
        return {"workers": self._workers, "mark": None if count is None else self._marks.get(count)}

    def load_state_dict(self, saved: Mapping[str, Any], count: int | None) -> None:
        """Compare the batch that follows on ``count`` batches of the next pass; None: none."""
        known = count is not None and saved["mark"] is not None and saved["workers"] == self._workers
        self._resumed = (count, saved["mark"]) if known and count is not None else None


def mark_of(batch: Any) -> str:
    """A digest of what the tensors and arrays in host memory look like."""
    digest = xxhash.xxh3_64()
    for one in islice(_arrays(batch, _LEVELS), _TENSORS):
        digest.update(f"{one.dtype}{one.shape}".encode())
        digest.update(np.ascontiguousarray(one if one.nbytes <= _ALL else one[_strided(one.shape)]).data)
    return digest.hexdigest()


def _strided(shape: Sequence[int]) -> tuple[slice, ...]:
    """Some elements of every dimension, without a copy of the rest."""
    each = max(round(_SOME ** (1 / len(shape))), 2)
    return tuple(slice(None, None, max(size // each, 1)) for size in shape)


def _arrays(value: Any, levels: int) -> Iterator[npt.NDArray[Any]]:
    if type(value) is torch.Tensor:
        if value.device.type == "cpu" and value.layout is torch.strided and not value.is_quantized:
            plain = value.detach().resolve_conj().resolve_neg()
            yield (plain if plain.dtype not in _WORDS else plain.view(_WORDS[plain.dtype])).numpy()
    elif type(value) is np.ndarray:
        if value.dtype.kind in "biufc":
            yield value
    elif not levels:
        return
    elif isinstance(value, Mapping):
        for key in value:
            yield from _arrays(value[key], levels - 1)
    elif isinstance(value, (list, tuple)):
        for one in value[:_TENSORS]:
            yield from _arrays(one, levels - 1)
