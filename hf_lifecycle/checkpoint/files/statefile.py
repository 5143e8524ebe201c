"""A tree of plain values in one file: :func:`write_tree` writes it wholly or not at all, :func:`read_tree` verifies it.

Values: None, bool, int of any size, float, str, bytes, list, tuple, dict and OrderedDict (keys: str, numbers, None,
bytes, and tuples of them), NumPy arrays and scalars of numbers, torch tensors of every dense type, ``torch.dtype``,
``torch.device`` and ``torch.Size``. They come back with the same types and bits; tensors come back on the CPU,
without ``requires_grad`` and without shared storage. Anything else is refused before a byte is written.

The suffix chooses the file: ``.safetensors`` (:mod:`hf_lifecycle.checkpoint.files.safetensors_file`) or ``.pt``
(:mod:`hf_lifecycle.checkpoint.files.torch_file`). Digests find what storage and transport do to a file. They are no
signature: whoever can write the file can write another whole one, which can still execute nothing.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

from hf_lifecycle.checkpoint.files import safetensors_file
from hf_lifecycle.checkpoint.files.durable import write_atomically
from hf_lifecycle.checkpoint.files.structure import DamagedStateError, TensorInfo, describe
from hf_lifecycle.errors import StateFileError

# torch is imported by the functions that need it, so that a file's structure is read without it.

__all__ = [
    "SUFFIXES",
    "TensorInfo",
    "check_suffix",
    "kind_of",
    "read_structure",
    "read_tree",
    "tree_from_bytes",
    "tree_to_bytes",
    "write_tree",
]

SUFFIXES = (".pt", ".safetensors")


def check_suffix(path: str | os.PathLike[str]) -> str:
    """Return the suffix of a state file.

    Raises:
        ValueError: It is neither ``.pt`` nor ``.safetensors``.
    """
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{os.fspath(path)}: the name of a state file must end in .pt or .safetensors, not in {suffix!r}"
        )
    return suffix


def write_tree(path: str | os.PathLike[str], tree: Mapping[str, Any], *, kind: str) -> None:
    """Write ``tree`` to ``path``, wholly or not at all.

    Args:
        path: The file, ending in ``.pt`` or ``.safetensors``, in a directory that exists.
        tree: Plain values under string keys. It may not change while it is written.
        kind: What the file is for; :func:`read_tree` refuses another kind.

    Raises:
        ValueError: The suffix is another, a key of the root is not usable, or a container contains itself.
        UnsafeStateError: A value is none of the plain kinds; ``key`` says where it is.
        OSError: The file cannot be written. What was there before is untouched.
    """
    suffix = check_suffix(path)
    for key in tree:
        if type(key) is not str or not key or key.startswith("$") or key == "hf_lifecycle":
            raise ValueError(f"{key!r} cannot be a key at the root of a state file")

    from hf_lifecycle.checkpoint.files import torch_file
    from hf_lifecycle.checkpoint.files.tree import encode

    node, blobs = encode(tree)
    module = safetensors_file if suffix == ".safetensors" else torch_file
    write_atomically(path, lambda file: module.write(file, kind, node, blobs))


def read_tree(path: str | os.PathLike[str], *, kind: str | Collection[str]) -> dict[str, Any]:
    """Read what :func:`write_tree` wrote, of this kind or one of these, verified bit by bit.

    Raises:
        ValueError: The suffix is neither ``.pt`` nor ``.safetensors``.
        FileNotFoundError: There is no such file. Any other ``OSError``: it cannot be read.
        StateFileError: It is torn, damaged, hostile, of another program or kind, or of a newer format.
    """
    suffix = check_suffix(path)

    try:
        with open(path, "rb") as file:
            return _read(file, suffix, kind)
    except DamagedStateError as error:
        raise StateFileError(path, str(error)) from error


def _read(file: IO[bytes], suffix: str, kind: str | Collection[str]) -> dict[str, Any]:
    from hf_lifecycle.checkpoint.files import torch_file
    from hf_lifecycle.checkpoint.files.tree import decode

    found, node, blobs = (safetensors_file if suffix == ".safetensors" else torch_file).read(file)
    return _checked(found, kind, decode(node, blobs))


def tree_to_bytes(tree: Mapping[str, Any], *, kind: str) -> bytes:
    """A tree as :func:`write_tree` takes it, for another process."""
    from hf_lifecycle.checkpoint.files import torch_file
    from hf_lifecycle.checkpoint.files.tree import encode

    buffer = io.BytesIO()
    torch_file.write(buffer, kind, *encode(tree))
    return buffer.getvalue()


def tree_from_bytes(data: bytes, *, kind: str) -> dict[str, Any]:
    """The tree that :func:`tree_to_bytes` wrote, verified.

    Raises:
        DamagedStateError: The bytes are not such.
    """
    return _read(io.BytesIO(data), ".pt", kind)


def read_structure(path: str | os.PathLike[str], *, kind: str | Collection[str] | None = None) -> dict[str, Any]:
    """Read a ``.safetensors`` state file without its tensors and without importing torch; None admits any ``kind``.

    Returns:
        The tree, with a :class:`TensorInfo` in the place of every tensor, array and bytes, a text in the place of a
        ``torch.dtype`` or ``torch.device``, and a tuple in the place of a ``torch.Size``. The tensors' bytes are not
        verified.

    Raises:
        ValueError: It does not end in ``.safetensors``.
        FileNotFoundError, StateFileError: As in :func:`read_tree`.
    """
    if check_suffix(path) != ".safetensors":
        raise ValueError(f"{os.fspath(path)}: only .safetensors files can be read without torch")
    try:
        with open(path, "rb") as file:
            found, node, _ = safetensors_file.read_contents(file)
        return _checked(found, found if kind is None else kind, describe(node))
    except DamagedStateError as error:
        raise StateFileError(path, str(error)) from error


def kind_of(path: str | os.PathLike[str]) -> str:
    """What a ``.safetensors`` state file is for, read without its tensors.

    Raises:
        FileNotFoundError, StateFileError: As in :func:`read_tree`.
    """
    try:
        with open(path, "rb") as file:
            return safetensors_file.read_contents(file)[0]
    except DamagedStateError as error:
        raise StateFileError(path, str(error)) from error


def _checked(found: str, wanted: str | Collection[str], tree: Any) -> dict[str, Any]:
    kinds = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if found not in kinds:
        raise DamagedStateError(f"it is a {found!r} file, not a {' or '.join(map(repr, kinds))} file")
    if type(tree) is not dict:
        raise DamagedStateError(f"it holds a {type(tree).__name__}, not a tree")
    return tree
