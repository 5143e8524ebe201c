"""State files that end in ``.pt``: written by ``torch.save``, read only by ``torch.load(weights_only=True)``.

``torch.load(path, weights_only=True)`` gives a dict with the keys of the tree, each holding its structure (see
:mod:`hf_lifecycle.checkpoint.files.structure`), and under ``hf_lifecycle`` the format, the kind, the digest over both
and the structure, and the tensors by name. Not promised: that a file made to exhaust memory is refused; nothing in it
is ever executed.
"""

from __future__ import annotations

import errno
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch

from hf_lifecycle.checkpoint.files.safetensors_file import Blob
from hf_lifecycle.checkpoint.files.structure import FORMAT, DamagedStateError, ForeignStateError, dump, parse, seal
from hf_lifecycle.checkpoint.files.tree import tensor_bytes
from hf_lifecycle.state.gathering import is_dense

__all__ = ["HEADER", "load_safely", "read", "write"]

HEADER = "hf_lifecycle"


class _FaultKeeper(io.RawIOBase):
    """Hands bytes on and keeps the first fault until :meth:`raise_fault`.

    torch's archive writer turns an ``OSError`` of the file below it into a ``RuntimeError`` without number or cause,
    so it is never shown one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._fault: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._fault is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._fault = error
        return memoryview(data).nbytes

    def raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault


def write(file: IO[bytes], kind: str, node: Mapping[str, Any], blobs: Mapping[str, Blob]) -> None:
    """Write a tree that was taken apart."""
    header = {
        "format": FORMAT,
        "kind": kind,
        "digest": seal(kind, dump(node)),
        "tensors": {name: _as_tensor(blob) for name, blob in blobs.items()},
    }
    keeper = _FaultKeeper(file)
    torch.save({**node, HEADER: header}, cast("IO[bytes]", keeper))
    keeper.raise_fault()


def _as_tensor(blob: Blob) -> torch.Tensor:
    if blob.data.size == 0:
        return torch.empty(blob.shape, dtype=getattr(torch, blob.dtype))
    # torch warns of arrays that may not be written to (bytes are such); nothing writes to this one.
    data = blob.data if blob.data.flags.writeable else blob.data.copy()
    tensor: torch.Tensor = torch.from_numpy(data).view(getattr(torch, blob.dtype)).reshape(blob.shape)
    return tensor


def load_safely(file: IO[bytes] | Path, allow: Sequence[Any] = ()) -> Any:
    """``torch.load`` that executes nothing: tensors, plain containers and the globals in ``allow``.

    Args:
        file: A binary file; or the path of one, whose tensors are then mapped and not read.
        allow: What ``torch.serialization.safe_globals`` takes.

    Raises:
        ForeignStateError: It names a global that is not allowed.
        DamagedStateError: It cannot be loaded so, for any other reason.
    """
    try:
        with torch.serialization.safe_globals(list(allow)):
            # torch maps archives alone; what it wrote before there were any is read.
            mapped = isinstance(file, Path) and zipfile.is_zipfile(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None)
    except Exception as error:  # what a damaged archive or pickle raises has no common base
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: it sought a place that cannot be
            raise
        if refused := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise ForeignStateError(f"it names {refused[1]}, which could run code, so it was not loaded") from error
        raise DamagedStateError(f"torch cannot load it ({type(error).__name__}: {_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The unpickler's own words, without the advice before and after them on how to load the file unsafely."""
    paragraphs = str(error).strip().split("\n\n")
    own = paragraphs[-2] if len(paragraphs) > 1 and paragraphs[0].startswith("Weights only") else paragraphs[0]
    return own.strip().rpartition("\n")[2][:200]


def read(file: IO[bytes]) -> tuple[str, Any, dict[str, Blob]]:
    """Read kind, structure and tensors.

    Raises:
        ForeignStateError: It holds something else.
        DamagedStateError: It is torn, flipped, hostile, or of a newer format.
    """
    if not file.read(1):
        raise DamagedStateError("it is torn: it has 0 bytes")
    file.seek(0)
    content = load_safely(file)
    if not isinstance(content, dict) or not isinstance(content.get(HEADER), dict):
        raise ForeignStateError("it is a torch file, but not one of hf_lifecycle")
    header = content.pop(HEADER)
    kind, digest, tensors, version = (header.get(field) for field in ("kind", "digest", "tensors", "format"))
    if version != FORMAT:
        raise DamagedStateError(
            f"it has format {version}, and this version reads format {FORMAT}; upgrade hf-lifecycle"
        )
    try:
        text = dump(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedStateError(f"its structure differs from what was saved ({error})") from error
    if not isinstance(kind, str) or not isinstance(tensors, dict) or digest != seal(kind, text):
        raise DamagedStateError("its structure differs from what was saved")
    # Invariant: what is decoded is what the digest covers, so it is read back from that text.
    return kind, parse(text), {str(name): _as_blob(name, tensor) for name, tensor in tensors.items()}


def _as_blob(name: Any, tensor: Any) -> Blob:
    if type(tensor) is not torch.Tensor or not is_dense(tensor):
        raise DamagedStateError(f"tensor {name!r} is not a dense tensor")
    # An expanded view of a few bytes would ask for any amount of memory.
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
        raise DamagedStateError(f"tensor {name!r} is not laid out as it was saved")
    return Blob(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor_bytes(tensor))
