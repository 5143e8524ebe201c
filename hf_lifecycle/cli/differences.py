"""What differs between two states, leaf by leaf and bit for bit.

Leaves are compared by type and bits: NaN equals NaN of the same bits, 0.0 does not equal -0.0. Differences of tensors
are counted block by block, never all of them in memory at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_lifecycle.checkpoint.files.safetensors_file import Bytes, blocks_of_file
from hf_lifecycle.checkpoint.files.tree import tensor_bytes
from hf_lifecycle.cli.contents import StoredTensor
from hf_lifecycle.cli.leaves import RefusedStateError
from hf_lifecycle.messages import cut

__all__ = ["differing_leaves"]

_BLOCK = 4 << 20
_CODES = {"torch.float16": "F16", "torch.float32": "F32", "torch.float64": "F64", "torch.bfloat16": "BF16"}

_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


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

    def add(self, one: Bytes, other: Bytes) -> None:
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

    def _numbers(self, bits: Bytes) -> npt.NDArray[np.float64] | None:
        if self.dtype == "BF16":
            return (bits.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return bits.view(_FLOATS[self.dtype]).astype(np.float64) if self.dtype in _FLOATS else None

    def sentence(self, elements: int) -> str | None:
        """What was found, in words; None where nothing differs."""
        if not self.different:
            return None
        most = f", by at most {self.largest:.3g}" if self.largest else ""
        return f"{self.different:,} of {elements:,} elements differ{most}"


def differing_leaves(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The path of every leaf that differs, in the order of ``one``, and how."""
    for path, value in one.items():
        if path not in other:
            yield path, f"only in A: {_short(value)}"
        else:
            what = _difference(value, other[path])
            if what is not None:
                yield path, what
    for path in (path for path in other if path not in one):
        yield path, f"only in B: {_short(other[path])}"


def _difference(one: Any, other: Any) -> str | None:
    if isinstance(one, StoredTensor):
        return f"{one} -> {other}" if str(one) != str(other) else _stored(one, other)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return f"{_short(one)} -> {_short(other)}"
        return _tensors(_CODES.get(str(one.dtype), ""), one.element_size(), _tensor_bits(one), _tensor_bits(other))
    if isinstance(one, (np.ndarray, np.generic)) and type(one) is type(other):
        if one.dtype.hasobject or one.dtype != other.dtype or one.shape != other.shape:
            return f"{_short(one)} -> {_short(other)}"
        code = {"<f4": "F32", "<f8": "F64", "<f2": "F16"}.get(one.dtype.str, "")
        return _tensors(code, one.dtype.itemsize, _array_bits(one), _array_bits(other))
    if isinstance(one, float) and isinstance(other, float):
        return None if struct.pack("<d", one) == struct.pack("<d", other) else f"{one!r} -> {other!r}"
    return None if type(one) is type(other) and one == other else f"{_short(one)} -> {_short(other)}"


def _stored(one: StoredTensor, other: StoredTensor) -> str | None:
    lies, twin = one.lies, other.lies
    if lies.size != twin.size:
        return f"{lies.size} bytes -> {twin.size} bytes"
    tally = Tally(lies.dtype, lies.width)
    with open(one.path, "rb") as file, open(other.path, "rb") as twin_file:
        for block, twin_block in zip(blocks_of_file(file, lies), blocks_of_file(twin_file, twin), strict=True):
            tally.add(block, twin_block)
    return tally.sentence(lies.size // lies.width)


def _tensors(code: str, width: int, one: Bytes, other: Bytes) -> str | None:
    tally, block = Tally(code, width), _BLOCK - _BLOCK % max(width, 1)
    for start in range(0, len(one), block):
        tally.add(one[start : start + block], other[start : start + block])
    return tally.sentence(len(one) // max(width, 1))


def _tensor_bits(tensor: torch.Tensor) -> Bytes:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise RefusedStateError(f"it holds a {tensor.layout} tensor on {tensor.device}, which cannot be compared")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise RefusedStateError("it holds a tensor that is larger than its storage")
    return tensor_bytes(tensor)


def _array_bits(array: Any) -> Bytes:
    return np.frombuffer(array.tobytes(), np.uint8)


def _short(value: Any) -> str:
    if isinstance(value, StoredTensor):
        return str(value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{value.dtype} {list(value.shape)}"
    is_plain = value is None or isinstance(value, (int, float, complex, str, bytes, np.generic, list, tuple, dict))
    return cut(repr(value) if is_plain else type(value).__qualname__)
