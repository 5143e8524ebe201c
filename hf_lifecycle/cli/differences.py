"""What the files of a checkpoint are compared as, and what differs between two states, bit for bit.

Promise: every file of a checkpoint is compared as weights, as a state of torch's, or as bytes, in whichever folder it
lies; what this package adds in ``lifecycle/`` is compared by itself. Nothing in a file can run code: torch's are read
by ``torch.load(weights_only=True)`` alone.

Leaves are compared by type and bits: NaN equals NaN of the same bits, 0.0 does not equal -0.0. Differences of tensors
are counted block by block, never all of them in memory at once.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hf_lifecycle.checkpoint.directory.manifest import files_below
from hf_lifecycle.checkpoint.directory.pickles import is_of_an_engine
from hf_lifecycle.checkpoint.files.legacy import NUMPY_NAMES
from hf_lifecycle.checkpoint.files.safetensors_file import Bytes, TensorSlice, blocks_of_file, read_header
from hf_lifecycle.checkpoint.files.structure import DamagedStateError
from hf_lifecycle.checkpoint.files.torch_file import load_safely
from hf_lifecycle.checkpoint.files.tree import tensor_bytes
from hf_lifecycle.cli.leaves import RefusedStateError
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.messages import cut

__all__ = [
    "REGISTERED",
    "RNG",
    "StoredTensor",
    "differing_leaves",
    "load_torch",
    "names_in",
    "plain_files",
    "tensors_of",
    "torch_files",
]

RNG, REGISTERED = "RNG", "registered objects"

_TORCH_GROUPS = {"optimizer": "optimizer", "scheduler": "scheduler", "scaler": "gradient scaler"}
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_OF_RANKS = re.compile(r"(rng_state|random_states)(_\d+)?\.(pth|pkl)")  # Trainer's, and accelerate's
_CUSTOM = re.compile(r"custom_checkpoint_\d+\.pkl")  # what is registered with an accelerator
_MODEL = re.compile(r"(model_\d+)[.-]")  # accelerate's name for each model but the first
_NOT_READ = "training_args.bin"


def names_in(*checkpoints: Path) -> list[str]:
    """The files of all of them, by their path in the checkpoint, less what is in ``lifecycle/``."""
    found = {path.relative_to(one).as_posix() for one in checkpoints for path in files_below(one)}
    return sorted(name for name in found if PurePosixPath(name).parts[0] != "lifecycle")


def torch_files(names: list[str]) -> Iterator[tuple[str, str]]:
    """The files of torch's among ``names``, each with the group that it is told under."""
    for name in names:
        file = PurePosixPath(name).name
        if _OF_RANKS.fullmatch(file):
            yield name, RNG
        elif _CUSTOM.fullmatch(file):
            yield name, REGISTERED
        elif PurePosixPath(name).suffix in _TORCH_SUFFIXES and file != _NOT_READ and not is_of_an_engine(file):
            yield name, _TORCH_GROUPS.get(PurePosixPath(name).stem, name)


def plain_files(names: list[str]) -> list[str]:
    """Those whose bytes are compared: configuration, tokenizer, whatever else there is."""
    torchs = {name for name, _ in torch_files(names)}
    known = (".safetensors", *_TORCH_SUFFIXES)
    return [
        name
        for name in names
        if (name not in torchs and PurePosixPath(name).suffix not in known and name != "trainer_state.json")
        or is_of_an_engine(PurePosixPath(name).name)
    ]


class StoredTensor(NamedTuple):
    """A tensor that is left in its file."""

    path: Path
    lies: TensorSlice

    def __str__(self) -> str:
        return f"{self.lies.dtype} {list(self.lies.shape)}"


def tensors_of(checkpoint: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors files, by name; before it the folder, or the model where there are several.

    In which shard a tensor lies is not told: the same weights may lie in others.
    """
    found: dict[str, StoredTensor] = {}
    for name in names_in(checkpoint):
        if PurePosixPath(name).suffix == ".safetensors":
            model = _MODEL.match(PurePosixPath(name).name)
            where = [part for part in (str(PurePosixPath(name).parent), model[1] if model else ".") if part != "."]
            prefix = f"{'/'.join(where)}: " if where else ""
            for tensor, lies in read_header(checkpoint / name).items():
                found[prefix + tensor] = StoredTensor(checkpoint / name, lies)
    return found


def load_torch(path: Path) -> Any:
    """Read a file of torch's with nothing but tensors, plain values and NumPy arrays allowed in it.

    Raises:
        StateFileError: It is damaged, or holds anything else.
    """
    try:
        return load_safely(path, NUMPY_NAMES)
    except DamagedStateError as error:
        raise StateFileError(path, f"refused: {error}") from error


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
