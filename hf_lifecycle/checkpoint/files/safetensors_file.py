"""State files that end in ``.safetensors``: every tensor by name, the structure in the header.

Layout, as the safetensors format has it: 8 bytes, the length of the header, little endian; the header, JSON padded
with spaces to a multiple of 8; the tensors' bytes without gaps, wider element types first. The header's
``__metadata__`` holds ``format`` (``pt``), ``hf_lifecycle.format`` (the version of this layout),
``hf_lifecycle.kind``, ``hf_lifecycle.structure`` (see :mod:`hf_lifecycle.checkpoint.files.structure`) and
``hf_lifecycle.digest``, xxh3-128 over those three. Any safetensors reader can open such a file.

It is read here without torch, in full bounds checks, into memory of its own: nothing stays mapped. The header of any
other safetensors file, a model's, is read by the same checks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hf_lifecycle.checkpoint.files.regular import open_regular
from hf_lifecycle.checkpoint.files.structure import (
    FORMAT,
    MAX_HEADER_BYTES,
    DamagedStateError,
    ForeignStateError,
    dump,
    parse,
    seal,
)
from hf_lifecycle.errors import StateFileError

__all__ = [
    "NATIVE_TYPES",
    "Blob",
    "Bytes",
    "TensorSlice",
    "blocks_of_file",
    "read",
    "read_contents",
    "read_header",
    "write",
]

Bytes = npt.NDArray[np.uint8]

_PREFIX = "hf_lifecycle."
_BLOCK = 4 << 20  # a multiple of every element's width

# torch's name of an element type, the format's, and its width in bytes. A file holds all others as plain bytes.
_ELEMENT_TYPES = (
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
NATIVE_TYPES = frozenset(name for name, _, _ in _ELEMENT_TYPES)
_CODES = {name: (code, width) for name, code, width in _ELEMENT_TYPES}
_NAMES = {code: (name, width) for name, code, width in _ELEMENT_TYPES}


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
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin

    @property
    def width(self) -> int:
        """Bytes of an element; 1 where an element has no whole number of bytes, so that bytes are counted instead."""
        width, rest = divmod(self.size, max(self.elements, 1))
        return width if not rest and width in (1, 2, 4, 8, 16) else 1


def write(file: IO[bytes], kind: str, node: Any, blobs: Mapping[str, Blob]) -> None:
    """Write a tree that was taken apart.

    Raises:
        ValueError: Structure and names need more than the 100 MB that a header may have.
    """
    text = dump(node)
    _check_header_size(len(text))
    metadata = {
        "format": "pt",
        f"{_PREFIX}format": str(FORMAT),
        f"{_PREFIX}kind": kind,
        f"{_PREFIX}digest": seal(kind, text),
        f"{_PREFIX}structure": text,
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    ordered = sorted(blobs.items(), key=lambda item: -_CODES[item[1].dtype][1])  # so that each lies aligned
    for name, blob in ordered:
        end = offset + blob.data.size
        header[name] = {"dtype": _CODES[blob.dtype][0], "shape": list(blob.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = dump(header).encode("ascii")
    encoded += b" " * (-len(encoded) % 8)
    _check_header_size(len(encoded))
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for _, blob in ordered:
        file.write(blob.data.data)


def _check_header_size(size: int) -> None:
    if size > MAX_HEADER_BYTES:
        raise ValueError(
            f"the structure of this state takes {size} bytes, and a header may have at most {MAX_HEADER_BYTES}; "
            "store long lists of numbers as tensors or arrays"
        )


def read_contents(file: IO[bytes]) -> tuple[str, Any, dict[str, TensorSlice]]:
    """Read kind and structure, and where each tensor lies; the file is exactly as long as its header says.

    Raises:
        ForeignStateError: It is a whole safetensors file of another program.
        DamagedStateError: It is torn, flipped, hostile, or of a newer format.
    """
    metadata, tensors = _read_header(file)
    if not isinstance(metadata, dict) or not any(str(key).startswith(_PREFIX) for key in metadata):
        raise ForeignStateError("it is a safetensors file, but not one of hf_lifecycle")
    kind, text, digest = (metadata.get(f"{_PREFIX}{field}") for field in ("kind", "structure", "digest"))
    version = metadata.get(f"{_PREFIX}format")
    if version != str(FORMAT):
        raise DamagedStateError(
            f"it has format {version}, and this version reads format {FORMAT}; upgrade hf-lifecycle"
        )
    if not isinstance(kind, str) or not isinstance(text, str) or digest != seal(kind, text):
        raise DamagedStateError("its structure differs from what was saved")
    return kind, parse(text), tensors


def read_header(path: Path) -> dict[str, TensorSlice]:
    """The tensors of any safetensors file by name, in the order of the file.

    Raises:
        StateFileError: It is not a whole safetensors file.
        OSError: It cannot be read, or is no file.
    """
    try:
        with open_regular(path) as file:
            return _read_header(file)[1]
    except DamagedStateError as error:
        raise StateFileError(path, str(error)) from error


def _read_header(file: IO[bytes]) -> tuple[Any, dict[str, TensorSlice]]:
    """The metadata and the tensors; the file is exactly as long as they say."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise DamagedStateError(f"it is torn: it has {size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise DamagedStateError(f"it is no safetensors file: its header would have {length} bytes")
    if 8 + length > size:
        raise DamagedStateError(f"it is torn: it has {size} bytes, its header alone {8 + length}")
    header = parse(file.read(length))
    if not isinstance(header, dict):
        raise DamagedStateError("its header is no JSON object")
    return header.pop("__metadata__", {}), _check_tensors(header, 8 + length, size)


def _check_tensors(header: dict[str, Any], start: int, size: int) -> dict[str, TensorSlice]:
    """The tensors in the order of the file; DamagedStateError unless they cover it without gap or overlap."""
    tensors = {}
    position = start
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        begin, end = (start + offset for offset in _offsets(name, entry))
        shape, code = entry.get("shape"), entry.get("dtype")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise DamagedStateError(f"tensor {name!r} has the shape {shape!r}")
        if not isinstance(code, str):
            raise DamagedStateError(f"tensor {name!r} has the element type {code!r}")
        _, width = _NAMES.get(code, (code, 0))
        if begin != position or (width and end - begin != math.prod(shape) * width):
            raise DamagedStateError(
                f"tensor {name!r} is not at the offset that its shape and the tensors before it require"
            )
        tensors[name] = TensorSlice(code, tuple(shape), begin, end)
        position = end
    if position != size:
        raise DamagedStateError(f"it is torn: it has {size} bytes and should have {position}")
    return tensors


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise DamagedStateError(f"tensor {name!r} has no offsets")
    if not 0 <= offsets[0] <= offsets[1]:
        raise DamagedStateError(f"tensor {name!r} lies outside the file")
    return offsets[0], offsets[1]


def read(file: IO[bytes]) -> tuple[str, Any, dict[str, Blob]]:
    """Read kind, structure and tensors, each into memory of its own.

    Raises:
        ForeignStateError, DamagedStateError: As :func:`read_contents` has it.
    """
    kind, node, tensors = read_contents(file)
    blobs = {}
    for name, tensor in tensors.items():
        data = np.empty(tensor.size, np.uint8)
        file.seek(tensor.begin)
        if file.readinto(data.data) != data.size:  # type: ignore[attr-defined]
            raise DamagedStateError("it became shorter while it was read")
        dtype, _ = _NAMES.get(tensor.dtype, (tensor.dtype, 0))
        blobs[name] = Blob(dtype, tensor.shape, data)
    return kind, node, blobs


def blocks_of_file(file: IO[bytes], tensor: TensorSlice) -> Iterator[Bytes]:
    """A tensor's bytes, block by block."""
    file.seek(tensor.begin)
    left = tensor.size
    while left and (block := file.read(min(_BLOCK, left))):
        left -= len(block)
        yield np.frombuffer(block, np.uint8)
