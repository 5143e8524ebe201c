"""Whether loading a folder of ``torch.distributed.checkpoint`` would run code. FSDP's sharded files are such folders.

Its reader unpickles ``.metadata`` without asking what that names, and each value there that is no tensor (a learning
rate, say), which lies in a ``.distcp`` file, likewise. Here ``.metadata`` is read with inert stand-ins for the classes
that such a file consists of, and every value that is no tensor as ``weights_only`` reads it. Tensors are not read:
torch itself loads them so.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.files.structure import DamagedStateError, ForeignStateError

# torch is imported when there is something to look at.

__all__ = ["METADATA", "reason_to_refuse_shards"]

METADATA = (".metadata", "__*.metadata")  # of all ranks, or of one

_FORMAT = "torch.distributed.checkpoint.metadata"
_CLASSES = frozenset(
    {
        *((_FORMAT, f"{kind}StorageMetadata") for kind in ("Tensor", "Chunk", "Bytes")),
        *((_FORMAT, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        (_FORMAT, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("pathlib", f"{kind}Path") for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")),
    }
)
_TELLING = frozenset({"Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "_StorageInfo"})
_BROKEN = (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


class _StandIn:
    """In place of an object of a class by this name: it keeps its attributes and does nothing."""

    def __new__(cls, *_: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


class _Record(_StandIn):
    """One whose attributes tell what is read: they are exactly those that its real class would come to have.

    Pickle can give an object attributes by its constructor, and by slots, where a stand-in would miss them.
    """

    def __new__(cls, *given: Any) -> _Record:
        if given:
            raise ForeignStateError(f"{cls.__name__} is built in a way that torch does not write, so it was not loaded")
        record: _Record = object.__new__(cls)
        return record

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ForeignStateError(
                f"{type(self).__name__} is filled in a way that torch does not write, so it was not loaded"
            )
        super().__setstate__(state)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (module == "torch" and _is_dtype(name)):
            return type(name, (_Record if name in _TELLING else _StandIn,), {})
        raise ForeignStateError(f"it names {module}.{name}, which could run code, so it was not loaded")


def _is_dtype(name: str) -> bool:
    import torch

    return isinstance(getattr(torch, name, None), torch.dtype)


def reason_to_refuse_shards(metadata: Path) -> str | None:
    """Why nothing is to be loaded by this ``.metadata``; None where loading it runs nothing.

    Raises:
        OSError: It, or a file that it speaks of, cannot be read.
    """
    from hf_lifecycle.checkpoint.files.torch_file import load_safely

    try:
        for name, content in _values(metadata):
            try:
                load_safely(io.BytesIO(content))
            except DamagedStateError as error:
                return f"{name}: {error}"
    except DamagedStateError as error:
        return str(error)
    return None


def _values(metadata: Path) -> Iterator[tuple[str, bytes]]:
    """What is no tensor: where it lies, and its bytes."""
    try:
        with open(metadata, "rb") as file:
            found = vars(_Reader(file).load())
        kinds, places = found["state_dict_metadata"], found["storage_data"]
        told = [(vars(index)["fqn"], vars(place)) for index, place in places.items()]
        wanted = [(str(fqn), place) for fqn, place in told if type(kinds[fqn]).__name__ != "TensorStorageMetadata"]
        parts = [(fqn, _place(fqn, place)) for fqn, place in wanted]
    except DamagedStateError:
        raise
    except (*_BROKEN, RecursionError) as error:
        raise DamagedStateError(f"not what torch.distributed.checkpoint writes ({error})") from error
    for fqn, (name, offset, length) in parts:
        with open(metadata.parent / name, "rb") as file:
            file.seek(offset)
            yield f"{fqn}, in {name}", file.read(length)


def _place(fqn: str, place: Mapping[str, Any]) -> tuple[str, int, int]:
    name, offset, length = place["relative_path"], place["offset"], place["length"]
    if not isinstance(name, str) or Path(name).name != name:
        raise ForeignStateError(f"{fqn} is listed in {name!r}, which is outside the checkpoint, so it was not loaded")
    if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
        raise DamagedStateError(f"{fqn} is listed at offset {offset!r} with {length!r} bytes")
    if place.get("transform_descriptors"):
        raise ForeignStateError(f"{fqn} is packed in a way that cannot be checked, so it was not loaded")
    return name, offset, length
