"""Training-state files of the original project, read without executing anything.

They are dicts written by ``torch.save`` with NumPy's and Python's RNG states as tuples, so ``weights_only`` refuses
them as they are. They are admitted through a list of exactly the names that such a file needs, each mapped to a
function here that builds arrays and scalars of numbers and nothing else. Not promised: a custom state that held
objects of classes; it is refused, as it could only be loaded by executing it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hf_lifecycle.checkpoint.files.structure import DamagedStateError, ForeignStateError
from hf_lifecycle.checkpoint.files.torch_file import load_safely
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.state.rng.states import HOST_SOURCES

__all__ = ["NUMPY_NAMES", "read_original"]

_NUMBERS = "biufc"
_REQUIRED = ("epoch", "step", "torch_rng_state", "numpy_rng_state", "python_rng_state")


def _empty_array(kind: Any, *_shape_and_type: Any) -> Any:
    if kind is not np.ndarray:
        raise TypeError(f"{kind} is not numpy.ndarray")
    return np.empty(0, np.int8)  # its real shape, type and content follow as its state


def _scalar(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, np.dtype) or dtype.kind not in _NUMBERS or not isinstance(content, bytes):
        raise TypeError("not a NumPy scalar of a number")
    return np.frombuffer(content, dtype)[0]


# numpy.core became numpy._core in NumPy 2; a file of either may be read under either.
NUMPY_NAMES: list[Any] = [
    *((_empty_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDG"},
]


def read_original(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of the original project.

    Returns:
        ``epoch``, ``step``, ``best_metric``, ``custom_state``, and ``rng`` as
        :meth:`hf_lifecycle.state.rng.states.RngState.from_state_dict` takes it.

    Raises:
        FileNotFoundError: There is no such file.
        StateFileError: It is not such a file, or holds what could only be loaded by executing it.
    """
    try:
        with open(path, "rb") as file:
            content = load_safely(file, NUMPY_NAMES)
        if not isinstance(content, dict) or not all(key in content for key in _REQUIRED):
            raise ForeignStateError("it is a torch file, but not one of hf_lifecycle")
        return {
            "epoch": content["epoch"],
            "step": content["step"],
            "best_metric": content.get("best_metric"),
            "custom_state": content.get("custom_state") or {},
            "rng": _rng(content),
        }
    except DamagedStateError as error:
        raise StateFileError(path, str(error)) from error


def _rng(content: Mapping[str, Any]) -> dict[str, Any]:
    """The RNG states of the file under the names and in the form of :mod:`hf_lifecycle.state.rng.states`."""
    try:
        packed = {one.name: one.pack(content[f"{one.name}_rng_state"]) for one in HOST_SOURCES}
        devices = content.get("cuda_rng_state_all")
        if devices is None:  # the state of the one device that was current
            devices = [content["cuda_rng_state"]] if content.get("cuda_rng_state") is not None else []
        tensors = {"torch": packed["torch"]} | {f"cuda:{index}": state for index, state in enumerate(devices)}
        return packed | {name: torch.as_tensor(state) for name, state in tensors.items()}
    except (OverflowError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedStateError(f"it has no valid RNG states ({error})") from error
