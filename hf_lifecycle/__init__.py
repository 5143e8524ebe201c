"""Exact resume for Hugging Face training: an interrupted and resumed run ends bit for bit like an uninterrupted one.

Public names load on first use (PEP 562), so that ``import hf_lifecycle`` costs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lifecycle.checkpoint.directory.retention import (
        AnyOf,
        KeepBest,
        KeepEveryHours,
        KeepEverySteps,
        KeepLast,
        RetentionPolicy,
    )
    from hf_lifecycle.early_stopping import EarlyStopping
    from hf_lifecycle.errors import (
        DamagedCheckpoint,
        DirectoryInUse,
        LifecycleError,
        MetricNotFound,
        MirrorError,
        MirrorOfAnotherRun,
        NoCommonCheckpoint,
        NotEnoughSpace,
        NoUsableCheckpoint,
        RankFailed,
        RankUnreachable,
        ResumeMismatch,
        SaveFailed,
        StateFileError,
        StateMismatch,
        UnsafeStateError,
        UnsupportedTraining,
    )
    from hf_lifecycle.global_batch import elastic_arguments
    from hf_lifecycle.hosts.trainer.callback import LifecycleCallback
    from hf_lifecycle.mirror.latest import latest_checkpoint
    from hf_lifecycle.mirror.settings import Mirror
    from hf_lifecycle.training_state import TrainingStateManager
    from hf_lifecycle.views.run import Checkpoint, Run

__version__ = "0.2.0"

_HOMES = {
    name: f"hf_lifecycle.{home}"
    for home, names in {
        "checkpoint.directory.retention": "AnyOf KeepBest KeepEveryHours KeepEverySteps KeepLast RetentionPolicy",
        "early_stopping": "EarlyStopping",
        "errors": "DamagedCheckpoint DirectoryInUse LifecycleError MetricNotFound MirrorError MirrorOfAnotherRun "
        "NoCommonCheckpoint NoUsableCheckpoint NotEnoughSpace RankFailed RankUnreachable ResumeMismatch SaveFailed "
        "StateFileError StateMismatch UnsafeStateError UnsupportedTraining",
        "global_batch": "elastic_arguments",
        "hosts.trainer.callback": "LifecycleCallback",
        "mirror.latest": "latest_checkpoint",
        "mirror.settings": "Mirror",
        "training_state": "TrainingStateManager",
        "views.run": "Checkpoint Run",
    }.items()
    for name in names.split()
}

__all__ = [
    "AnyOf",
    "Checkpoint",
    "DamagedCheckpoint",
    "DirectoryInUse",
    "EarlyStopping",
    "KeepBest",
    "KeepEveryHours",
    "KeepEverySteps",
    "KeepLast",
    "LifecycleCallback",
    "LifecycleError",
    "MetricNotFound",
    "Mirror",
    "MirrorError",
    "MirrorOfAnotherRun",
    "NoCommonCheckpoint",
    "NoUsableCheckpoint",
    "NotEnoughSpace",
    "RankFailed",
    "RankUnreachable",
    "ResumeMismatch",
    "RetentionPolicy",
    "Run",
    "SaveFailed",
    "StateFileError",
    "StateMismatch",
    "TrainingStateManager",
    "UnsafeStateError",
    "UnsupportedTraining",
    "__version__",
    "elastic_arguments",
    "latest_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
