"""How the bits of two tensors differ: counted block by block, never all of them in memory at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_lifecycle.checkpoint.files.safetensors_file import Bytes

__all__ = ["Tally"]

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
