"""The names of accelerate that are relied on and not promised: no other module here uses one.

Where a version lacks a name, its list is empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_lifecycle.relied_on import Unpromised, report_missing

__all__ = [
    "RELIED_ON",
    "USED_IN_TESTING",
    "forget_singletons",
    "loaders_of",
    "models_of",
    "optimizers_of",
    "registered_with",
    "report_missing_names",
    "schedulers_of",
    "unregister",
    "without_weights",
]

_PREPARED = "prepare() returns them to the program, and hooks get only the models of a save or a load"
_WAITS = "save(wait=False) blocks until the checkpoint is written"
RELIED_ON = (
    Unpromised(
        "_models",
        "finds the models: their digests, buffers that no file holds, saves in the background",
        "loaded models are not compared with their digests, buffers that are in no file start from their initial "
        f"values, and {_WAITS}",
        _PREPARED,
    ),
    Unpromised(
        "_optimizers",
        "finds the optimizers: counting their steps, their digests, saves in the background",
        f"loaded optimizers are not compared with their digests, steps outside batches() are not counted, and {_WAITS}",
        _PREPARED,
    ),
    Unpromised(
        "_schedulers",
        "finds the schedulers: their digests, and their place on another number of processes",
        "loaded schedulers are not compared with their digests, nor converted for another number of processes",
        _PREPARED,
    ),
    Unpromised(
        "_dataloaders",
        "identifies a loader by its number, compares its settings, and isolates the RNG states of training from "
        "other loaders",
        "loaders are identified by the order in which they are iterated, and changed settings are not reported",
        _PREPARED,
    ),
    Unpromised(
        "_custom_objects",
        "removes what the manager registered with the accelerator",
        "an accelerator can be used with one manager only, and a copy of it holds the manager",
        "there is no way to undo register_for_checkpointing()",
    ),
)
# Used by :mod:`hf_lifecycle.testing` alone.
USED_IN_TESTING = (
    Unpromised(
        "_reset_state",
        "hf_lifecycle.testing tests a resume within one process",
        "testing fails",
        "none",
    ),
)


def report_missing_names(accelerator: Any) -> None:
    """Warn once of each name that this accelerator lacks."""
    import accelerate

    report_missing(
        f"accelerate {accelerate.__version__}: {type(accelerator).__name__}",
        RELIED_ON,
        lambda name: hasattr(accelerator, name),
    )


def forget_singletons() -> None:
    """Let accelerate know no more than in a new process; for trying a resume out in one."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for singleton in (AcceleratorState, GradientState, PartialState):
        singleton._reset_state()


def models_of(accelerator: Any) -> list[Any]:
    """The models that it prepared, in their wrappers."""
    return getattr(accelerator, "_models", [])


def optimizers_of(accelerator: Any) -> list[Any]:
    """The optimizers that it prepared, in their wrappers."""
    return getattr(accelerator, "_optimizers", [])


def schedulers_of(accelerator: Any) -> list[Any]:
    """The schedulers that it prepared, in their wrappers."""
    return getattr(accelerator, "_schedulers", [])


def loaders_of(accelerator: Any) -> list[Any]:
    """The loaders that it prepared, in their wrappers."""
    return getattr(accelerator, "_dataloaders", [])


def registered_with(accelerator: Any) -> list[Any]:
    """The objects that were registered for checkpointing."""
    return getattr(accelerator, "_custom_objects", [])


def unregister(attributes: dict[str, Any], one: object) -> None:
    """Take an object out of the attributes of an accelerator it was registered with; a copy's list stays as it is."""
    registered = attributes.get("_custom_objects", [])
    if any(each is one for each in registered):
        attributes["_custom_objects"] = [each for each in registered if each is not one]


@contextmanager
def without_weights(accelerator: Any) -> Iterator[None]:
    """Let ``accelerator.save_state`` find no models and no optimizers within the block."""
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers
