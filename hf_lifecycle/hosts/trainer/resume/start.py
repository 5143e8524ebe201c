"""How a run begins: fresh, or where it was interrupted, with everything restored, proved and reported first.

Promise: training continues only when the state is the one that was saved, or a warning has said what is not.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.data.micro_batches import of_each_process
from hf_lifecycle.engine.made_with import report_of_no_effect
from hf_lifecycle.engine.resume_report import ResumeReport
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.hosts.trainer.host import callbacks_with_state, path_given_to_train, present_trainer
from hf_lifecycle.hosts.trainer.options import Options
from hf_lifecycle.hosts.trainer.resume import repair
from hf_lifecycle.hosts.trainer.resume.differences import differences_from, facts_of, schedule_unlike
from hf_lifecycle.hosts.trainer.resume.pending_events import PendingEvents
from hf_lifecycle.hosts.trainer.resume.program import unlike_program
from hf_lifecycle.hosts.trainer.resume.schedule import Schedule
from hf_lifecycle.hosts.trainer.resume.source import ResumeSource, find_resume_source, mark_of
from hf_lifecycle.hosts.trainer.resume.weights import Weights
from hf_lifecycle.hosts.trainer.resume.world_size import Resized, depends_on_ranks
from hf_lifecycle.hosts.trainer.run_state.data_objects import DataState
from hf_lifecycle.hosts.trainer.run_state.outside_model import Outside
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.hosts.trainer.run_state.randomness import Randomness
from hf_lifecycle.hosts.trainer.run_state.stream_position import StreamPlace
from hf_lifecycle.hosts.trainer.saves.rank_state import Checkpoints
from hf_lifecycle.hosts.trainer.stopping import Stopping
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.environment import Difference
from hf_lifecycle.state.proof import Proof, unwrapped

__all__ = ["Resume"]

logger = logging.getLogger("hf_lifecycle")

_ONLY_MODEL = "save_only_model=True: checkpoints hold no optimizer, so "
_NEW_OPTIMIZER = (
    "no resume can be exact; set it to False, or resume with LifecycleCallback(strict=False) and a new optimizer"
)
_NO_RESUME = "DeepSpeed cannot resume from them; set it to False"
_WAY_ON = "in a callback's on_epoch_begin"
_NOT_STRICT = (
    "make the script the same as the one that saved, or pass LifecycleCallback(strict=False) to resume "
    "anyway, not exactly"
)


@dataclass(frozen=True, slots=True)
class _Begun:
    """What a rank found when it began: where from, what this run is like, and what is not as it was."""

    origin: ResumeSource | None
    facts: dict[str, Any]
    proof: Proof | None
    report: ResumeReport
    ended: bool


@dataclass(frozen=True, slots=True)
class Resume:
    """Begins one call of ``train()`` with these parts."""

    position: Position
    stopping: Stopping
    due: PendingEvents
    randomness: Randomness
    data: DataState
    stream: StreamPlace
    weights: Weights
    schedule: Schedule
    outside: Outside
    checkpoints: Checkpoints
    ranks: Ranks
    given: Options
    strict: bool
    began: float = field(default_factory=time.monotonic)

    def begin(self, args: TrainingArguments, state: TrainerState, trained: Mapping[str, Any]) -> None:
        """Restore, prove and report; then take over the loader.

        Args:
            trained: What the event brought: ``model``, ``optimizer``, ``lr_scheduler``, ``train_dataloader``.

        Raises:
            ResumeMismatch: Something is not as it was saved.
        """
        _require_same_origin(state, self.ranks)
        with self.ranks.agree(what="resuming" if state.global_step > 0 else "starting"):
            begun = self._restore(args, state, trained)
        place = path_given_to_train() if begun.origin is None else begun.origin.path
        resumed_from = None if place is None or state.global_step == 0 else Path(os.path.abspath(place))
        self.checkpoints.prepare(args, state, begun.facts, resumed_from)
        with self.ranks.agree(what="repairing what was loaded"):
            self._announce(args, state, begun)
            if state.global_step > 0 and begun.origin is None:
                self._repair_stock(args, trained)

    def _restore(self, args: TrainingArguments, state: TrainerState, trained: Mapping[str, Any]) -> _Begun:
        """What this rank does by itself."""
        loader = trained["train_dataloader"]
        facts = facts_of(args, loader, elastic=self.given.elastic)
        if self.given.resume_from is not None and state.global_step == 0:
            raise ResumeMismatch(
                self.given.resume_from,
                ["resume_from is given, but train() starts from step 0"],
                "call train(resume_from_checkpoint=...)",
            )
        origin = self._find(args, state)
        self.weights.prepare(trained["model"], trained["optimizer"], trained["lr_scheduler"])
        resized = Resized.of(origin, args, elastic=self.given.elastic)
        if resized is not None:
            resized.require(args, self.given.on_world_size_change)
            self.weights.require_reshardable(resized.origin.path)
        left_out = () if resized is None else (self.data.key, self.stream.key)
        if resized is not None and not self.given.elastic:
            left_out = (*left_out, self.randomness.key)
        problems = self.checkpoints.restore(origin, leave_out=left_out) if origin is not None else []
        if resized is not None:
            if not self.given.elastic:
                self.randomness.derive(args, state)
            resized.move(self.position)
        lacks = "" if origin is None else origin.without_optimizer
        proof: Proof | None = None
        if origin is not None:
            proof, unproved = self.weights.prove(origin.path, saved_by=origin.world_size, model_only=bool(lacks))
            problems += unproved
        if lacks:
            problems.append(f"{lacks}, so optimizer and scheduler start from their initial state")
        if origin is not None:
            _point_best_checkpoint_at(origin, state)
        problems += self.position.prepare(args, state, loader)
        unsupported = self.randomness.prepare(args, state, loader)
        if self.given.elastic:
            unsupported += depends_on_ranks(args, state, trained["model"], facts["data"]["examples"])
        changed, lost = self.data.prepare()
        if self.given.elastic and (taken := self.randomness.loader) is not None:
            lost = [*lost, *(f"elastic=True: {one}" for one in [of_each_process(taken)] if one is not None)]
        problems, unsupported = problems + changed, unsupported + lost
        self.stream.prepare()
        changed, lost = self.outside.prepare()
        problems, unsupported = problems + changed, unsupported + lost
        if origin is not None and self.randomness.loader is not None:
            facts["data"]["order_seed"] = origin.saved["data"]["order_seed"]
            self.randomness.loader.continue_order(facts["data"]["order_seed"])
        iterable = self.randomness.loader is not None and self.randomness.loader.iterable
        differences: list[Difference] = []
        if origin is not None:
            following = trained["optimizer"], trained["lr_scheduler"], self.stopping, self.schedule
            differences = differences_from(origin, facts, args, state, *following, streamed=iterable)
            schedule = trained["lr_scheduler"], self.schedule
            undone, other = schedule_unlike(origin, facts, differences, state, *schedule)
            differences, unsupported = differences + undone, unsupported + other
        if resized is not None:
            differences = resized.admit(differences)
        problems += [f"this machine has no {name}" for name in self.randomness.missing_sources]
        report = ResumeReport(None if origin is None else origin.path, strict=self.strict, advice=_NOT_STRICT)
        report.require(problems, differences, only_told="" if origin is None else self._only_told(differences, state))
        ended = self.due.prepare(args, state, stopped=self.stopping.stopped)
        if resized is not None:
            unsupported = [*unsupported, resized.said]
        if origin is not None:
            unsupported = [*unsupported, *unlike_program(origin.saved, facts)]
            facts["program"] = origin.saved["program"]
        report.problems += unsupported
        return _Begun(origin, facts, proof, report, ended)

    def _only_told(self, differences: list[Difference], state: TrainerState) -> str:
        """Why differences are no error, in words; empty where they are."""
        step = state.global_step
        if self.schedule.has_no_step_left(differences, state):
            return f"no step is left to train (step {step} of {state.max_steps}), so what differs is only reported"
        if self.schedule.is_made_longer(differences, state):
            return f"the run had ended at step {step}, and a new run continues from there, as with Trainer alone"
        return ""

    def _find(self, args: TrainingArguments, state: TrainerState) -> ResumeSource | None:
        try:
            return find_resume_source(args, state, self.given.resume_from)
        except ResumeMismatch as mismatch:
            if self.strict:
                raise
            logger.warning("%s", ResumeMismatch(mismatch.checkpoint, mismatch.problems))
            return None

    def _announce(self, args: TrainingArguments, state: TrainerState, begun: _Begun) -> None:
        origin, problems = begun.origin, begun.report.problems
        if state.is_hyper_param_search:
            logger.info(
                "hyperparameter search: each trial starts from step 0, and Trainer writes its checkpoints: they are "
                "not verified, kept or mirrored, and a resume of a trial is not exact"
            )
        if args.save_only_model:
            is_of_deepspeed = getattr(present_trainer(), "is_deepspeed_enabled", False)
            problems.append(_ONLY_MODEL + (_NO_RESUME if is_of_deepspeed else _NEW_OPTIMIZER))
        if not getattr(args, "dataloader_in_order", True) and args.dataloader_num_workers > 1:
            problems.append("dataloader_in_order=False: batches come in the order in which workers finish them")
        for name in [] if args.restore_callback_states_from_checkpoint else callbacks_with_state():
            problems.append(
                f"{name} has state that Trainer does not restore: set restore_callback_states_from_checkpoint=True, "
                "or use LifecycleCallback(patience=...) instead"
            )
        begun.report.warn()
        no_effect = report_of_no_effect(begun.report.differences, _WAY_ON, is_exact=not problems)
        if no_effect is not None:
            logger.warning("%s", no_effect)
        owned = self.randomness.loader.dataset.owned_generators() if self.randomness.loader is not None else []
        if owned:
            logger.debug("seeded with the data stream: %s", ", ".join(owned))
        if origin is not None:
            assert begun.proof is not None
            ended, at = " (the run had ended)" if begun.ended else "", self.position
            begun.report.finish(
                f"step {state.global_step}{ended}: epoch {at.epoch + 1}, batch {at.resumes_at_batch}",
                origin.saved["identity"],
                attempt=self.checkpoints.attempt,
                restored=self.checkpoints.restored,
                proof=begun.proof,
                seconds=time.monotonic() - self.began,
                directory=Path(args.output_dir or ".") if args.should_save else None,
            )
        elif state.global_step > 0:
            logger.warning(
                "the checkpoint at step %d has nothing that LifecycleCallback saved: training continues from it, but "
                "not exactly; a resume from a later save will be exact",
                state.global_step,
            )

    def _repair_stock(self, args: TrainingArguments, trained: Mapping[str, Any]) -> None:
        """What can be done for a checkpoint without digests: tensors that have no key in the file were not loaded."""
        path = path_given_to_train()
        if path is None:
            return
        model = unwrapped(trained["model"])
        lost = repair.lost_by_stock_loading(model, path)
        if not lost:
            return
        cause = repair.model_from_checkpoint(model, path, lost)
        if cause is not None:
            raise ResumeMismatch(path, [f"Trainer did not load {name}" for name in lost] + [cause])
        logger.warning("%s: Trainer had not loaded %d tensors; they were loaded from the checkpoint", path, len(lost))


def _require_same_origin(state: TrainerState, ranks: Ranks) -> None:
    """Raise ``ResumeMismatch`` on every rank where they resume from different checkpoints."""
    mark = mark_of(state)
    attempts = ranks.gather(
        [state.global_step, None if mark is None else mark.get("attempt")],
        what="comparing the checkpoints that the ranks resume from",
    )
    if any(attempt != attempts[0] for attempt in attempts):
        raise ResumeMismatch(
            None,
            [
                f"rank {rank} resumes from step {step}, saved by {by or 'stock'}"
                for rank, (step, by) in enumerate(attempts)
            ],
            "give every rank the same resume_from_checkpoint, such as what latest_checkpoint() returns",
        )


def _point_best_checkpoint_at(origin: ResumeSource, state: TrainerState) -> None:
    """Where the output directory was moved, the best checkpoint is still beside the one resumed from."""
    if state.best_global_step is None:
        return
    best = origin.path.parent / f"checkpoint-{state.best_global_step}"
    if best.is_dir():
        state.best_model_checkpoint = str(best)
