"""A tree of plain values, taken apart into a structure and the bytes of its tensors, and put together again.

Promise: what :func:`encode` accepts, :func:`decode` gives back with the same types, dtypes, shapes and bits. Not kept:
``requires_grad``, the device (everything is read to the CPU), memory layout and shared storage of tensors, and
attributes that someone hung on a dict. No disk is touched here.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from hf_lifecycle.checkpoint.files import structure
from hf_lifecycle.checkpoint.files.safetensors_file import NATIVE_TYPES, Blob, Bytes
from hf_lifecycle.checkpoint.files.structure import DamagedStateError
from hf_lifecycle.errors import UnsafeStateError
from hf_lifecycle.state.gathering import is_dense

__all__ = ["decode", "encode", "reason_to_leave_out", "require_storable", "tensor_bytes"]

_UNASKED = 16 * 2**20  # bytes of a state that nobody asked for

_KEY_TYPES = (type(None), bool, int, float, str, bytes, tuple, torch.dtype, torch.device)


def encode(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Blob]]:
    """Take ``tree`` apart into its structure and its tensors by readable name (``rng/torch``).

    Raises:
        UnsafeStateError: A value is none of the plain kinds, with its place in the tree.
        ValueError: A container contains itself, or is nested more than 50 deep.
    """
    encoder = _Encoder()
    return {key: encoder.node(value, key, _clean(key)) for key, value in tree.items()}, encoder.blobs


def require_storable(tree: Mapping[str, Any]) -> None:
    """Return if :func:`encode` will take ``tree``; raise what it would raise. No tensor's bytes are read."""
    encoder = _Encoder(reads=False)
    for key, value in tree.items():
        encoder.node(value, key, _clean(key))


def reason_to_leave_out(state: Any) -> str | None:
    """Why a state that nobody asked for is not stored, or None: there is no plain form of it, or it is large."""
    try:
        _, blobs = encode({"state": state})
    except (UnsafeStateError, ValueError) as error:
        return str(error)
    size = sum(blob.data.nbytes for blob in blobs.values())
    if size > _UNASKED:
        return f"it has {size / 2**20:.0f} MB; pass it in objects= to have it copied with every batch"
    return None


def decode(node: Any, blobs: Mapping[str, Blob]) -> Any:
    """Put a tree together again, comparing every tensor with its digest.

    Raises:
        DamagedStateError: The structure or a tensor is not what was written.
    """
    used: set[str] = set()

    def content(tag: str) -> Callable[[Mapping[str, Any]], Any]:
        def leaf(node: Mapping[str, Any]) -> Any:
            used.add(node[tag])
            data = _verified(node[tag], node, blobs.get(node[tag]))
            return _REBUILD[tag](node["dtype"], tuple(node["shape"]), data)

        return leaf

    tree = structure.decode(
        node,
        {
            **{tag: content(tag) for tag in _REBUILD},
            "$dtype": lambda node: _torch_dtype(node["$dtype"]),
            "$device": lambda node: torch.device(node["$device"]),
            "$size": lambda node: torch.Size(node["$size"]),
        },
    )
    if unknown := set(blobs) - used:
        raise DamagedStateError(f"it holds tensors that nothing refers to: {sorted(unknown)}")
    return tree


def tensor_bytes(tensor: torch.Tensor) -> Bytes:
    """The bytes of a dense tensor in C order, without a copy where it lies so on the CPU already."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if dense.numel() == 0:  # its strides are arbitrary, and view() may refuse them
        return np.empty(0, np.uint8)
    flat = dense.reshape(-1)
    if flat.stride() != (1,):  # a single element passes for contiguous with any stride, and view() does not take it
        flat = flat.clone(memory_format=torch.contiguous_format)
    array: Bytes = flat.view(torch.uint8).numpy()
    return array


@dataclass(slots=True)
class _Encoder:
    blobs: dict[str, Blob] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)  # containers that enclose the present value, by identity
    reads: bool = True

    def node(self, value: Any, key: str, name: str) -> Any:
        kind = type(value)
        if kind in _SCALARS:
            return _SCALARS[kind](value)
        if kind in _ENCODERS:
            return _ENCODERS[kind](self, value, key, name)
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            return structure.scalar_node(value)
        raise UnsafeStateError(key, kind)

    def items(self, container: Any, parts: list[tuple[Any, str, str]], key: str) -> list[Any]:
        if id(container) in self.open:
            raise ValueError(f"{key} contains itself, which cannot be stored")
        if len(self.open) >= structure.MAX_DEPTH:
            raise ValueError(f"{key} is nested more than {structure.MAX_DEPTH} deep; store a flatter state")
        self.open.add(id(container))
        nodes = [self.node(value, f"{key}{place}", f"{name}") for value, place, name in parts]
        self.open.remove(id(container))
        return nodes

    def sequence(self, value: Any, key: str, name: str) -> Any:
        nodes = self.items(value, [(item, f"[{i}]", f"{name}/{i}") for i, item in enumerate(value)], key)
        return nodes if type(value) is list else {"$tuple": nodes}

    def mapping(self, value: dict[Any, Any], key: str, name: str) -> Any:
        nodes = self.items(value, [(v, f"[{k!r}]", f"{name}/{_clean(k)}") for k, v in value.items()], key)
        if type(value) is dict and all(type(k) is str and not k.startswith("$") for k in value):
            return dict(zip(value, nodes, strict=True))
        keys = [self.key(k, key, name) for k in value]
        tag = "$dict" if type(value) is dict else "$ordered"
        return {tag: [list(pair) for pair in zip(keys, nodes, strict=True)]}

    def key(self, value: Any, key: str, name: str) -> Any:
        if not isinstance(value, (*_KEY_TYPES, np.generic)):
            raise UnsafeStateError(f"the key {value!r} of {key}", type(value))
        return self.node(value, f"the key {value!r} of {key}", f"{name}/key")

    def tensor(self, value: torch.Tensor, key: str, name: str) -> Any:
        if not is_dense(value) or value.is_nested:
            raise UnsafeStateError(f"{key} (only dense tensors that hold data can be stored)", type(value))
        dtype = str(value.dtype).removeprefix("torch.")
        if not self.reads:
            value = value.new_empty(0, device="cpu")
        try:
            data = tensor_bytes(value)
            _rebuild_tensor(dtype, tuple(value.shape), data)
        except (RuntimeError, TypeError) as error:  # an element type that torch cannot make of bytes
            raise UnsafeStateError(f"{key} (of {value.dtype})", type(value)) from error
        return self.blob("$tensor", dtype, tuple(value.shape), data, name)

    def array(self, value: npt.NDArray[Any], key: str, name: str) -> Any:
        if value.dtype.kind not in "biufc":
            raise UnsafeStateError(f"{key} (of dtype {value.dtype})", type(value))
        dense: Bytes = np.asarray(value, order="C").reshape(-1).view(np.uint8)
        return self.blob("$array", value.dtype.str, value.shape, dense, name)

    def octets(self, value: bytes, _key: str, name: str) -> Any:
        return self.blob("$bytes", "uint8", (len(value),), np.frombuffer(value, np.uint8), name)

    def blob(self, tag: str, dtype: str, shape: tuple[int, ...], data: Bytes, name: str) -> dict[str, Any]:
        unique, count = name, 1
        while unique in self.blobs or unique == "__metadata__":
            count += 1
            unique = f"{name}~{count}"
        self.blobs[unique] = Blob(*_stored_as(tag, dtype, shape, data.size), data)
        digest = xxhash.xxh3_128_hexdigest(data.data) if self.reads else ""
        return {tag: unique, "dtype": dtype, "shape": list(shape), "xxh3": digest}


_ENCODERS: dict[type, Callable[[_Encoder, Any, str, str], Any]] = {
    bytes: _Encoder.octets,
    list: _Encoder.sequence,
    tuple: _Encoder.sequence,
    dict: _Encoder.mapping,
    OrderedDict: _Encoder.mapping,
    np.ndarray: _Encoder.array,
    torch.Tensor: _Encoder.tensor,
    torch.nn.Parameter: _Encoder.tensor,
}

_SCALARS: dict[type, Callable[[Any], Any]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    str: lambda value: value,
    int: lambda value: value if -(2**63) <= value < 2**64 else {"$int": hex(value)},
    float: structure.float_node,
    torch.dtype: lambda value: {"$dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"$device": str(value)},
    torch.Size: lambda value: {"$size": list(value)},
}


def _clean(key: Any) -> str:
    """A part of a tensor's name: short, and safe in any header and any tool."""
    return re.sub(r"[^A-Za-z0-9_.:-]", "_", str(key))[:80]


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DamagedStateError(f"torch {torch.__version__} has no element type {name!r}")
    return dtype


def _stored_as(tag: str, dtype: str, shape: tuple[int, ...], size: int) -> tuple[str, tuple[int, ...]]:
    """Element type and shape under which a value lies in a file: its own, or those of plain bytes."""
    name = dtype
    if tag == "$array":
        native = np.dtype(dtype)
        name = native.name if native.isnative else ""
    return (name, shape) if name in NATIVE_TYPES else ("uint8", (size,))


def _verified(name: str, node: Mapping[str, Any], blob: Blob | None) -> Bytes:
    if blob is None:
        raise DamagedStateError(f"tensor {name!r} is missing")
    tag, shape = next(iter(node)), tuple(node["shape"])
    if (blob.dtype, blob.shape) != _stored_as(tag, node["dtype"], shape, blob.data.size):
        raise DamagedStateError(
            f"tensor {name!r} is {blob.dtype} {blob.shape} and was saved as {node['dtype']} {shape}"
        )
    if xxhash.xxh3_128_hexdigest(blob.data.data) != node["xxh3"]:
        raise DamagedStateError(f"the bytes of tensor {name!r} differ from those that were saved")
    return blob.data


def _rebuild_tensor(dtype: str, shape: tuple[int, ...], data: Bytes) -> torch.Tensor:
    if data.size == 0:
        return torch.empty(shape, dtype=_torch_dtype(dtype))
    tensor: torch.Tensor = torch.from_numpy(data).view(_torch_dtype(dtype)).reshape(shape)
    return tensor


def _rebuild_array(dtype: str, shape: tuple[int, ...], data: Bytes) -> Any:
    kind = np.dtype(dtype)
    if kind.kind not in "biufc":
        raise DamagedStateError(f"{kind} is no number type")
    return data.view(kind).reshape(shape)


_REBUILD: dict[str, Callable[[str, tuple[int, ...], Bytes], Any]] = {
    "$tensor": _rebuild_tensor,
    "$array": _rebuild_array,
    "$bytes": lambda _dtype, _shape, data: data.tobytes(),
}
