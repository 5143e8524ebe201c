"""State files that end in ``.safetensors``: every tensor by name, the structure in the header.

Layout, as the safetensors format has it: 8 bytes, the length of the header, little endian; the header, JSON padded
with spaces to a multiple of 8; the tensors' bytes without gaps, wider element types first. The header's
``__metadata__`` holds ``format`` (``pt``), ``hf_lifecycle.format`` (the version of this layout),
``hf_lifecycle.kind``, ``hf_lifecycle.structure`` (see :mod:`hf_lifecycle.checkpoint.structure`) and
``hf_lifecycle.digest``, xxh3-128 over those three. Any safetensors reader can open such a file.

It is read here without torch, in full bounds checks, into memory of its own: nothing stays mapped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from hf_lifecycle.checkpoint.blob import ELEMENT_TYPES, Blob
from hf_lifecycle.checkpoint.structure import (
    FORMAT,
    MAX_HEADER_BYTES,
    DamagedStateError,
    ForeignStateError,
    dump,
    parse,
    seal,
)

__all__ = ["Contents", "read_contents", "read_tensors", "write"]

_PREFIX = "hf_lifecycle."

_CODES = {name: (code, width) for name, code, width in ELEMENT_TYPES}
_NAMES = {code: (name, width) for name, code, width in ELEMENT_TYPES}


@dataclass(frozen=True, slots=True)
class Contents:
    """The header of a file, checked.

    Attributes:
        kind: What the file is for, as its writer said.
        node: The structure of the tree.
        tensors: For each name its element type as torch calls it, its shape, and where it begins and ends, in bytes
            from the start of the file; in the order of the file.
    """

    kind: str
    node: Any
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]


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
            f"the structure of this state takes {size} bytes and a header may have {MAX_HEADER_BYTES}; "
            "store long lists of numbers as tensors or arrays"
        )


def read_contents(file: IO[bytes]) -> Contents:
    """Read and check the header, and that the file is exactly as long as it says.

    Raises:
        ForeignStateError: It is a whole safetensors file of another program.
        DamagedStateError: It is torn, flipped, hostile, or of a newer format.
    """
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
    metadata = header.pop("__metadata__", {})
    tensors = _check_tensors(header, 8 + length, size)
    if not isinstance(metadata, dict) or not any(str(key).startswith(_PREFIX) for key in metadata):
        raise ForeignStateError("it is a safetensors file of another program")
    kind, text, digest = (metadata.get(f"{_PREFIX}{field}") for field in ("kind", "structure", "digest"))
    version = metadata.get(f"{_PREFIX}format")
    if version != str(FORMAT):
        raise DamagedStateError(f"it has format {version}; this version reads format {FORMAT}, so upgrade hf-lifecycle")
    if not isinstance(kind, str) or not isinstance(text, str) or digest != seal(kind, text):
        raise DamagedStateError("its structure is not what was saved")
    return Contents(kind, parse(text), tensors)


def _check_tensors(header: dict[str, Any], start: int, size: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
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
        dtype, width = _NAMES.get(code, (code, 0))
        if begin != position or (width and end - begin != math.prod(shape) * width):
            raise DamagedStateError(f"tensor {name!r} does not lie where its shape and the tensors before it say")
        tensors[name] = (dtype, tuple(shape), begin, end)
        position = end
    if position != size:
        raise DamagedStateError(f"it is torn: it has {size} bytes and should have {position}")
    return tensors


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise DamagedStateError(f"tensor {name!r} has no place in the file")
    if not 0 <= offsets[0] <= offsets[1]:
        raise DamagedStateError(f"tensor {name!r} lies outside the file")
    return offsets[0], offsets[1]


def read_tensors(file: IO[bytes], contents: Contents) -> dict[str, Blob]:
    """Read the tensors' bytes, each into memory of its own.

    Raises:
        DamagedStateError: The file ended before it should.
    """
    blobs = {}
    for name, (dtype, shape, begin, end) in contents.tensors.items():
        data = np.empty(end - begin, np.uint8)
        file.seek(begin)
        if file.readinto(data.data) != data.size:  # type: ignore[attr-defined]
            raise DamagedStateError("it grew shorter while it was read")
        blobs[name] = Blob(dtype, shape, data)
    return blobs
