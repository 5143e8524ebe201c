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
    "AnyOf": "hf_lifecycle.checkpoint.directory.retention",
    "Checkpoint": "hf_lifecycle.views.run",
    "DamagedCheckpoint": "hf_lifecycle.errors",
    "DirectoryInUse": "hf_lifecycle.errors",
    "EarlyStopping": "hf_lifecycle.early_stopping",
    "KeepBest": "hf_lifecycle.checkpoint.directory.retention",
    "KeepEveryHours": "hf_lifecycle.checkpoint.directory.retention",
    "KeepEverySteps": "hf_lifecycle.checkpoint.directory.retention",
    "KeepLast": "hf_lifecycle.checkpoint.directory.retention",
    "LifecycleCallback": "hf_lifecycle.hosts.trainer.callback",
    "LifecycleError": "hf_lifecycle.errors",
    "MetricNotFound": "hf_lifecycle.errors",
    "Mirror": "hf_lifecycle.mirror.settings",
    "MirrorError": "hf_lifecycle.errors",
    "MirrorOfAnotherRun": "hf_lifecycle.errors",
    "NoCommonCheckpoint": "hf_lifecycle.errors",
    "NoUsableCheckpoint": "hf_lifecycle.errors",
    "NotEnoughSpace": "hf_lifecycle.errors",
    "RankFailed": "hf_lifecycle.errors",
    "RankUnreachable": "hf_lifecycle.errors",
    "ResumeMismatch": "hf_lifecycle.errors",
    "RetentionPolicy": "hf_lifecycle.checkpoint.directory.retention",
    "Run": "hf_lifecycle.views.run",
    "SaveFailed": "hf_lifecycle.errors",
    "StateFileError": "hf_lifecycle.errors",
    "StateMismatch": "hf_lifecycle.errors",
    "TrainingStateManager": "hf_lifecycle.training_state",
    "UnsafeStateError": "hf_lifecycle.errors",
    "UnsupportedTraining": "hf_lifecycle.errors",
    "elastic_arguments": "hf_lifecycle.global_batch",
    "latest_checkpoint": "hf_lifecycle.mirror.latest",
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
