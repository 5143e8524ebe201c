"""What the files of a checkpoint are compared as: weights, torch's states, or bytes; and how torch's are read.

Promise: every file of a checkpoint is one of these, in whichever folder it lies; what this package adds in
``lifecycle/`` is compared by itself. Nothing in a file can run code: torch's are read by
``torch.load(weights_only=True)`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from hf_lifecycle.checkpoint.directory.manifest import files_below
from hf_lifecycle.checkpoint.directory.pickles import is_of_an_engine
from hf_lifecycle.checkpoint.files.legacy import NUMPY_NAMES
from hf_lifecycle.checkpoint.files.safetensors_file import TensorSlice, read_header
from hf_lifecycle.checkpoint.files.structure import DamagedStateError
from hf_lifecycle.checkpoint.files.torch_file import load_safely
from hf_lifecycle.errors import StateFileError

__all__ = ["REGISTERED", "RNG", "StoredTensor", "load_torch", "names_in", "plain_files", "tensors_of", "torch_files"]

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
