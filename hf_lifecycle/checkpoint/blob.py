"""The content of one tensor as it lies in a file, and the element types that a file has a name for. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ELEMENT_TYPES", "NATIVE_TYPES", "Blob", "Bytes"]

Bytes = npt.NDArray[np.uint8]

# torch's name of an element type, the format's, and its width in bytes. A file holds all others as plain bytes.
ELEMENT_TYPES = (
    ("bool", "BOOL", 1),
    ("uint8", "U8", 1),
    ("int8", "I8", 1),
    ("float8_e4m3fn", "F8_E4M3", 1),
    ("float8_e5m2", "F8_E5M2", 1),
    ("uint16", "U16", 2),
    ("int16", "I16", 2),
    ("float16", "F16", 2),
    ("bfloat16", "BF16", 2),
    ("uint32", "U32", 4),
    ("int32", "I32", 4),
    ("float32", "F32", 4),
    ("uint64", "U64", 8),
    ("int64", "I64", 8),
    ("float64", "F64", 8),
)
NATIVE_TYPES = frozenset(name for name, _, _ in ELEMENT_TYPES)


@dataclass(frozen=True, slots=True)
class Blob:
    """The content of one tensor as it lies in a file.

    Attributes:
        dtype: torch's name of the element type; ``uint8`` for types that a file has no name for.
        shape: Its shape; ``(number of bytes,)`` for types that a file has no name for.
        data: Its bytes in C order, little endian as on every machine that torch supports.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Bytes
