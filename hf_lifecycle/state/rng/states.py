"""Every random number generator that training draws from, read and written as one state.

Promise: ``restore_rng(capture_rng())`` changes nothing, and a state that cannot be restored whole is refused before
any generator is touched. Not covered: generators that user code owns (see :mod:`hf_lifecycle.data.generators`).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_lifecycle.errors import StateMismatch
from hf_lifecycle.state.rng import numpy_rng

__all__ = ["HOST_SOURCES", "RngState", "advance_host_rng", "capture_rng", "restore_rng", "rng_sources"]


@dataclass(frozen=True, slots=True)
class RngSource:
    """One generator: how its native state is read and set, and how that state becomes plain data and back."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    pack: Callable[[Any], Any] = lambda native: native
    unpack: Callable[[Any], Any] = lambda plain: plain


def _pack_python(native: Any) -> dict[str, Any]:
    version, words, gauss = native
    return {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss}


def _unpack_python(plain: Any) -> Any:
    native = (plain["version"], tuple(int(word) for word in plain["words"]), plain["gauss"])
    random.Random().setstate(native)  # raises where the state is not one
    return native


_NUMPY_FIELDS = ("kind", "words", "position", "has_gauss", "gauss")


def _pack_numpy(native: Any) -> dict[str, Any]:
    return dict(zip(_NUMPY_FIELDS, native, strict=True))


def _unpack_numpy(plain: Any) -> Any:
    native = tuple(plain[field] for field in _NUMPY_FIELDS)
    np.random.RandomState().set_state(native)  # raises where the state is not one
    return native


def _unpack_torch(plain: Any) -> torch.Tensor:
    state = torch.as_tensor(plain, dtype=torch.uint8).cpu()
    torch.Generator().set_state(state)  # raises where the state is not one
    return state


# torch's CPU generator is set directly: torch.manual_seed and friends would reach the accelerators as well.
HOST_SOURCES: tuple[RngSource, ...] = (
    RngSource("python", random.getstate, random.setstate, _pack_python, _unpack_python),
    RngSource("numpy", numpy_rng.read, numpy_rng.write, _pack_numpy, _unpack_numpy),
    RngSource(
        "torch",
        torch.default_generator.get_state,
        torch.default_generator.set_state,
        unpack=_unpack_torch,
    ),
)


def _device_sources(*, untouched: bool = False) -> tuple[RngSource, ...]:
    """One source for each visible device of the accelerator; none before it is initialised, unless ``untouched``.

    A state that is set before then is kept by torch and takes effect when the device is first used.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ()
    module = torch.get_device_module(accelerator.type)
    initialised = getattr(module, "is_initialized", lambda: True)()
    if not (initialised or untouched):
        return ()
    if not (hasattr(module, "get_rng_state") and hasattr(module, "set_rng_state")):
        return ()
    per_device = bool(inspect.signature(module.get_rng_state).parameters)  # not so on mps, which has one device

    def source(index: int) -> RngSource:
        device = torch.device(accelerator.type, index)
        place = (device,) if per_device else ()

        def unpack(plain: Any) -> torch.Tensor:
            state = torch.as_tensor(plain, dtype=torch.uint8).cpu()
            if initialised and state.numel() != module.get_rng_state(*place).numel():
                raise ValueError(f"the state of {device} has {state.numel()} bytes")
            return state

        return RngSource(
            str(device),
            lambda: module.get_rng_state(*place),
            lambda state: module.set_rng_state(state, *place),
            unpack=unpack,
        )

    return tuple(source(index) for index in range(torch.accelerator.device_count()))


def rng_sources(*, untouched: bool = False) -> dict[str, RngSource]:
    """Every generator of this process by name: ``python``, ``numpy``, ``torch`` and ``cuda:0`` and so on.

    Those of devices that are ``untouched`` yet can be set, too: a resumed run has saved theirs.
    """
    return {source.name: source for source in (*HOST_SOURCES, *_device_sources(untouched=untouched))}


@dataclass(frozen=True, slots=True)
class RngState:
    """The states of all generators at one moment. Take it with :func:`capture_rng`."""

    native: Mapping[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data (numbers, NumPy arrays, uint8 tensors), fit for a state file."""
        sources = rng_sources()
        return {name: sources[name].pack(state) for name, state in self.native.items()}

    @classmethod
    def from_state_dict(cls, plain: Mapping[str, Any]) -> tuple[RngState, tuple[str, ...]]:
        """Check ``plain`` and return the state with the names of saved generators that this machine lacks.

        Raises:
            StateMismatch: A host generator is missing.
            ValueError, TypeError, KeyError, RuntimeError: A generator's state is not one; nothing was changed.
        """
        sources = rng_sources(untouched=True)
        missing = [source.name for source in HOST_SOURCES if source.name not in plain]
        if missing:
            raise StateMismatch("the random number generators", missing=missing)
        native = {name: sources[name].unpack(state) for name, state in plain.items() if name in sources}
        return cls(native), tuple(name for name in plain if name not in sources)


def capture_rng() -> RngState:
    """Read every generator of this process."""
    return RngState({name: source.read() for name, source in rng_sources().items()})


def restore_rng(state: RngState) -> None:
    """Set every generator that ``state`` holds."""
    sources = rng_sources(untouched=True)
    for name, native in state.native.items():
        sources[name].write(native)


def advance_host_rng() -> None:
    """Draw once from each host generator, so that a state restored is not used twice."""
    random.random()
    np.random.random_sample()
    torch.rand((), generator=torch.default_generator)
