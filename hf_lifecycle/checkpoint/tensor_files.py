"""Tensors in safetensors files and how their bits differ, read without torch.

Promise: a header is bounded and checked before it is believed, no more than a few MiB are in memory at once, and
tensors are equal when dtype, shape and every byte are. Not done here: files of torch's own format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hf_lifecycle.errors import StateFileError

__all__ = ["Bits", "Tally", "TensorSlice", "blocks_of_file", "read_header"]

Bits = npt.NDArray[np.uint8]

_LARGEST_HEADER = 100_000_000  # the bound of the safetensors format
_BLOCK = 4 << 20  # a multiple of every element's width
_WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Where a tensor lies: its element type as the format calls it, its shape, and its bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of an element; 1 where an element has no whole number of bytes, so that bytes are counted instead."""
        width, rest = divmod(self.end - self.begin, max(self.elements, 1))
        return width if not rest and width in (1, 2, 4, 8, 16) else 1


def read_header(path: Path) -> dict[str, TensorSlice]:
    """The tensors of a safetensors file by name.

    Raises:
        StateFileError: It is not a whole safetensors file.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LARGEST_HEADER, size - 8):
            raise StateFileError(path, "cut off, or not a safetensors file")
        text = file.read(length)
    try:
        header = json.loads(text)
        return {name: _slice(entry, 8 + length, size) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise StateFileError(path, f"not a valid safetensors header ({type(error).__name__}: {error})") from error


def _slice(entry: Any, start: int, size: int) -> TensorSlice:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("a tensor is not described as the format wants it")
    if not begin <= end <= size - start:
        raise ValueError("a tensor lies outside the file")
    if dtype in _WIDTHS and end - begin != _WIDTHS[dtype] * math.prod(shape):
        raise ValueError("a tensor's size does not go with its shape")
    return TensorSlice(dtype, shape, start + begin, start + end)


def blocks_of_file(file: IO[bytes], tensor: TensorSlice) -> Iterator[Bits]:
    """A tensor's bytes, block by block."""
    file.seek(tensor.begin)
    left = tensor.end - tensor.begin
    while left and (block := file.read(min(_BLOCK, left))):
        left -= len(block)
        yield np.frombuffer(block, np.uint8)


@dataclass(slots=True)
class Tally:
    """How many elements of two tensors of one dtype and shape differ, and by how much at most.

    Attributes:
        dtype: The element type as the safetensors format calls it.
        width: Bytes of an element.
        different: Elements that are not equal bit for bit.
        largest: The largest absolute difference of floating-point elements; None where no such number exists.
    """

    dtype: str
    width: int
    different: int = 0
    largest: float | None = None

    def add(self, one: Bits, other: Bits) -> None:
        """Count a block of both tensors; both begin at the same element."""
        if one.tobytes() == other.tobytes():
            return
        rows = one.reshape(-1, self.width) != other.reshape(-1, self.width)
        self.different += int(rows.any(axis=1).sum())
        first, second = self._numbers(one), self._numbers(other)
        if first is None or second is None:
            return
        with np.errstate(all="ignore"):
            gaps = np.abs(first - second)
        finite = gaps[np.isfinite(gaps)]
        if finite.size:
            self.largest = max(self.largest or 0.0, float(finite.max()))

    def _numbers(self, bits: Bits) -> npt.NDArray[np.float64] | None:
        if self.dtype == "BF16":
            return (bits.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return bits.view(_FLOATS[self.dtype]).astype(np.float64) if self.dtype in _FLOATS else None

    def sentence(self, elements: int) -> str | None:
        """What was found, in words; None where nothing differs."""
        if not self.different:
            return None
        most = f", by at most {self.largest:.3g}" if self.largest else ""
        return f"{self.different:,} of {elements:,} elements differ{most}"
