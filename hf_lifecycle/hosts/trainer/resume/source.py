"""Where a run resumes from, and what this package saved there.

A callback is told neither the path that ``train()`` resumes from nor the trainer. The candidates are looked at in a
written order, and one counts only if its state file carries the identity that ``trainer_state.json`` brought along.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_lifecycle.checkpoint.directory.admission import way_to_another
from hf_lifecycle.checkpoint.directory.manifest import manifest_if_readable
from hf_lifecycle.checkpoint.files.additions import HOLDER, TRAINER, mark_in, marked, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.engine.resume_report import reading_unverified
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.hosts.trainer.host import path_given_to_train

__all__ = ["ResumeSource", "checkpoint_of", "find_resume_source", "identity", "mark_of", "saved_for", "set_mark"]


_AS_TRAINER = "to resume as Trainer does without it, not exactly"
_LOADED = ("optimizer.pt", "scheduler.pt")  # Trainer loads both, optimizer and schedule, or neither


@dataclass(frozen=True, slots=True)
class ResumeSource:
    """A checkpoint that this package saved: its directory and the tree in its state file."""

    path: Path
    saved: dict[str, Any]

    @property
    def world_size(self) -> int:
        """How many processes saved it."""
        return int(self.saved["environment"]["world_size"])

    @property
    def without_optimizer(self) -> str:
        """Why Trainer resumes from it with a new optimizer and a new schedule; empty where it does not."""
        if self.saved["arguments"].get("save_only_model"):
            return "the checkpoint was saved with save_only_model=True"
        manifest = manifest_if_readable(self.path)
        saved = set() if manifest is None else {one.path for one in manifest.files}
        gone = [name for name in _LOADED if name in saved and not (self.path / name).is_file()]
        return f"{' and '.join(gone)} deleted from the checkpoint" if gone else ""


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The directory that Trainer saves this step to."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def set_mark(state: TrainerState, attempt: str) -> None:
    """Let ``trainer_state.json``, when saved at this step, say by whom."""
    callbacks: Any = state.stateful_callbacks  # declared as a list, and a dict from its __post_init__ on
    control = callbacks.get(HOLDER, {"args": {}, "attributes": {}})
    callbacks[HOLDER] = marked(control, identity(attempt, state.global_step))


def identity(attempt: str, step: int) -> dict[str, Any]:
    """What ties a state file to the ``trainer_state.json`` beside it."""
    return {"attempt": attempt, "step": step}


def mark_of(state: TrainerState) -> Mapping[str, Any] | None:
    """The identity of the save that ``state`` was loaded from; None where that was not one of this package."""
    mark = mark_in(state.stateful_callbacks)
    return mark if mark is not None and mark.get("step") == state.global_step else None


def _candidates(
    args: TrainingArguments, state: TrainerState, resume_from: str | PathLike[str] | None
) -> Iterator[Path]:
    """Each once, by whatever name it comes first."""
    given = (resume_from, args.resume_from_checkpoint, path_given_to_train(), checkpoint_of(args, state))
    seen = set()
    for path in given:
        if isinstance(path, (str, PathLike)) and os.path.abspath(path) not in seen:
            seen.add(os.path.abspath(path))
            yield Path(path)


def _completed(saved: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What a rank saved, with the states of objects that it left to rank 0."""
    shared = saved.get("shared", [])
    if not shared:
        return saved
    first = read_tree(rank_file(checkpoint, 0), kind=TRAINER)["objects"]
    return {**saved, "objects": saved["objects"] | {name: first[name] for name in shared}}


def saved_for(checkpoint: Path, rank: int, world_size: int) -> dict[str, Any] | None:
    """What a rank saved there, or, if more or fewer ranks saved, what rank 0 did. None if it is not there."""
    file, main = rank_file(checkpoint, rank), rank_file(checkpoint, 0)
    saved = read_tree(file, kind=TRAINER) if file.is_file() else None
    if saved is None or saved["environment"]["world_size"] != world_size:
        # Other ranks saved it than those of now: what rank 0 saved is the best that any of them can have.
        of_main = read_tree(main, kind=TRAINER) if main.is_file() else None
        if of_main is not None and of_main["environment"]["world_size"] != world_size:
            return of_main
    return saved


def find_resume_source(
    args: TrainingArguments, state: TrainerState, resume_from: str | PathLike[str] | None
) -> ResumeSource | None:
    """The checkpoint that ``state`` was loaded from; None for a fresh run and for a checkpoint of stock Trainer.

    Raises:
        ResumeMismatch: The checkpoint was saved with this package, but its state file is not to be found.
        StateFileError: It was found, is as it was saved, and cannot be read.
    """
    mark, given = mark_of(state), path_given_to_train()
    if state.global_step == 0:
        return None
    if mark is None and given is not None and rank_file(given, args.process_index).is_file():
        problem = "its trainer_state.json does not name its save: it was written by an older version of hf_lifecycle"
        raise ResumeMismatch(given, [problem], "resume with the version that saved it")
    if mark is None:
        return None
    looked_at = []
    for path in _candidates(args, state, resume_from):
        file = rank_file(path, args.process_index)
        with reading_unverified(path):
            saved = saved_for(path, args.process_index, args.world_size)
        if saved is None:
            looked_at.append(f"{file}: missing")
            continue
        if saved["identity"] == dict(mark):
            return ResumeSource(path, _completed(saved, path))
        looked_at.append(f"{file}: belongs to another save")
    problems = [f"the state that LifecycleCallback saved with step {state.global_step} was not found", *looked_at]
    if given is None:
        move = "pass LifecycleCallback(resume_from=<the checkpoint directory>)"
    else:
        move = way_to_another(given) or "no other checkpoint there is intact"
    raise ResumeMismatch(given, problems, f"{move}; or pass LifecycleCallback(strict=False) {_AS_TRAINER}")
