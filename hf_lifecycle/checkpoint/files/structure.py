"""The shape of a stored tree as JSON, from which it is rebuilt with its exact types.

Values that JSON has are themselves. Every other value is an object whose first key is a tag:

=============  ======================================================================================
``$tuple``     a list of its items
``$dict``      a list of ``[key, value]`` pairs: keys that are not strings, or that begin with ``$``
``$ordered``   the same, an ``OrderedDict``
``$int``       hexadecimal digits, where the number needs more than 64 bits
``$float``     the 16 hexadecimal digits of its bits, where it is not finite
``$scalar``    a NumPy scalar: its dtype, and ``hex``, its bytes
``$tensor``    a tensor's name in the file, with ``dtype``, ``shape`` and ``xxh3``, the digest of its bytes
``$array``     a NumPy array, likewise
``$bytes``     bytes, likewise
``$dtype``     a ``torch.dtype``, likewise ``$device`` and ``$size``
=============  ======================================================================================

Neither torch nor the tensors are needed to read it. Not promised: a guard against forgery; the digests find damage.
"""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

__all__ = [
    "FORMAT",
    "MAX_DEPTH",
    "MAX_HEADER_BYTES",
    "DamagedStateError",
    "ForeignStateError",
    "TensorInfo",
    "decode",
    "describe",
    "dump",
    "float_node",
    "parse",
    "scalar_node",
    "seal",
]

FORMAT = 1
MAX_DEPTH = 50  # of containers in a tree
_MAX_LEVELS = 3 * MAX_DEPTH + 3  # of their structure: a mapping's tag, list of pairs and pair
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

Leaf = Callable[[Mapping[str, Any]], Any]


class DamagedStateError(ValueError):
    """What was read cannot be the tree that was written; the reader of the file adds its name."""


class ForeignStateError(DamagedStateError):
    """What was read was written by another program."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor, NumPy array or bytes that was not loaded: what it is, its element type and its shape."""

    kind: str
    dtype: str
    shape: tuple[int, ...]


def dump(node: Any) -> str:
    """The one text of a structure: ASCII, no spaces, keys in the order of the tree."""
    return json.dumps(node, allow_nan=False, separators=(",", ":"))


def parse(text: str | bytes) -> Any:
    """Read JSON strictly.

    Raises:
        DamagedStateError: It is no JSON, has a key twice, or is nested beyond all measure.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise DamagedStateError("a key occurs twice")
        return mapping

    def refuse(constant: str) -> Any:
        raise DamagedStateError(f"{constant} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise DamagedStateError("it is nested too deeply") from None
    except ValueError as error:
        raise DamagedStateError(f"its description is no JSON ({error})") from error


def seal(kind: str, text: str) -> str:
    """The digest that covers format, kind and structure, and with it the digest of every tensor."""
    return xxhash.xxh3_128_hexdigest(f"{FORMAT}\0{kind}\0{text}".encode())


def float_node(value: float) -> Any:
    """A float as JSON: a number where it is finite (its shortest text is exact), else its bits."""
    return value if abs(value) < float("inf") else {"$float": struct.pack(">d", value).hex()}


def scalar_node(value: np.generic) -> dict[str, str]:
    """A NumPy scalar as JSON."""
    return {"$scalar": value.dtype.str, "hex": value.tobytes().hex()}


def _read_scalar(node: Mapping[str, Any]) -> np.generic:
    dtype = np.dtype(node["$scalar"])
    if dtype.kind not in "biufc":
        raise DamagedStateError(f"{dtype} is no number type")
    scalar: np.generic = np.frombuffer(bytes.fromhex(node["hex"]), dtype)[0]
    return scalar


_PLAIN_LEAVES: dict[str, Leaf] = {
    "$int": lambda node: int(node["$int"], 16),
    "$float": lambda node: struct.unpack(">d", bytes.fromhex(node["$float"]))[0],
    "$scalar": _read_scalar,
}

_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {"$tuple": tuple, "$dict": dict, "$ordered": OrderedDict}


def decode(node: Any, leaves: Mapping[str, Leaf]) -> Any:
    """Rebuild a tree from its structure; ``leaves``, by tag, make tensors, arrays, bytes and torch values of nodes.

    Raises:
        DamagedStateError: The structure is not one that this module describes.
    """
    try:
        return _decode(node, {**_PLAIN_LEAVES, **leaves}, 0)
    except DamagedStateError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, struct.error) as error:
        raise DamagedStateError(f"a value cannot be rebuilt ({type(error).__name__}: {error})") from error


def _decode(node: Any, leaves: Mapping[str, Leaf], depth: int) -> Any:
    if depth > _MAX_LEVELS:
        raise DamagedStateError("it is nested too deeply")
    if isinstance(node, list):
        return [_decode(item, leaves, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    tag = next(iter(node), "")
    if not tag.startswith("$"):
        return {key: _decode(value, leaves, depth + 1) for key, value in node.items()}
    if tag in _CONTAINERS:
        # A pair of a mapping stays a list of two here; dict and OrderedDict take it as it is.
        return _CONTAINERS[tag](_decode(node[tag], leaves, depth + 1))
    if tag not in leaves:
        raise DamagedStateError(f"it holds an unknown kind of value, {tag}")
    return leaves[tag](node)


def _describe(kind: str) -> Leaf:
    return lambda node: TensorInfo(kind, str(node["dtype"]), tuple(node["shape"]))


def describe(node: Any) -> Any:
    """Rebuild a tree with a :class:`TensorInfo` where a tensor, array or bytes was, and torch's values as text."""
    return decode(
        node,
        {
            "$tensor": _describe("tensor"),
            "$array": _describe("array"),
            "$bytes": _describe("bytes"),
            "$dtype": lambda node: f"torch.{node['$dtype']}",
            "$device": lambda node: str(node["$device"]),
            "$size": lambda node: tuple(node["$size"]),
        },
    )
