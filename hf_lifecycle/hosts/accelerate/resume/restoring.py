"""How a loop resumes: what differs is found before anything changes, what was loaded is proved after.

Promise: the loop continues only when its state is the one that was saved, or a warning has said what is not.

A resumed program runs the body of the saved epoch from its top. Noise on the weights, a learning rate that is halved, a
scheduler that steps there: the checkpoint has that change already, so it is named. Of weights a sample is compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.files.additions import LOOP, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_structure
from hf_lifecycle.data.streams import seed_all
from hf_lifecycle.engine.load_proof import LoadProof
from hf_lifecycle.engine.made_with import report_of_no_effect
from hf_lifecycle.engine.readable import unlike_kinds
from hf_lifecycle.engine.resume_report import ResumeReport, reading_unverified, saved_by_version
from hf_lifecycle.errors import ResumeMismatch, StateMismatch
from hf_lifecycle.hosts.accelerate.intercept import models_of, optimizers_of, registered_with
from hf_lifecycle.hosts.accelerate.iteration.left_by_error import LEFT_BY_ERROR
from hf_lifecycle.hosts.accelerate.loop import Loop
from hf_lifecycle.hosts.accelerate.prepared import ENGINES, Prepared, model_name, optimizer_name
from hf_lifecycle.hosts.accelerate.resume.run_fingerprint import compare_facts
from hf_lifecycle.hosts.accelerate.resume.world_size import Change, change_of
from hf_lifecycle.hosts.accelerate.run_state.attributes import Attributes
from hf_lifecycle.hosts.accelerate.run_state.outside import Outside
from hf_lifecycle.hosts.accelerate.run_state.program import Program
from hf_lifecycle.hosts.accelerate.settings import RunSettings
from hf_lifecycle.messages import few, shortened
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.best import BestMetric
from hf_lifecycle.state.fingerprint import is_shared_out, module_tensors, sample_digests
from hf_lifecycle.state.objects import absent_objects, restore_objects
from hf_lifecycle.state.proof import Proof
from hf_lifecycle.state.rng.states import RngState, capture_rng

__all__ = ["NOT_STRICT", "PARTS", "Repeated", "Restoring"]

logger = logging.getLogger("hf_lifecycle")

NOT_STRICT = (
    "make the program the same as the one that saved, or pass TrainingStateManager(strict=False) to resume "
    "anyway, not exactly"
)
_ALIKE = (
    "make models and optimizers as the program that saved did; to train others from these weights, load "
    "model.safetensors yourself and begin in another directory"
)
PARTS = ("position", "randomness", "weights", "best", "outside", "attributes", "variables")
_SHARDED = (*ENGINES, "FSDP")  # whose states are in files of their own
_CONVERTED = ("world_size", "gradient_accumulation_steps", "distributed_type", "batch_size", "rows")


@dataclass(slots=True)
class Restoring:
    """Checks and applies what a rank's file holds.

    Attributes:
        report: What the last check and the load found.
    """

    accelerator: Any
    ranks: Ranks
    loop: Loop
    proof: LoadProof
    outside: Outside
    attributes: Attributes
    program: Program
    best: BestMetric
    settings: RunSettings
    report: ResumeReport = field(init=False)
    _change: Change | None = None  # of the number of processes, which the load that runs continues over

    def require_alike(self, checkpoint: Path) -> None:
        """Raise where accelerate would end with an error, or with half of it loaded; nothing is changed.

        Raises:
            ResumeMismatch: A model has other tensors, which ``strict=False`` makes a warning, for the program's hooks
                may load them; or an optimizer could not step with the state that was saved.
        """
        file = rank_file(checkpoint, 0)
        with reading_unverified(checkpoint):
            saved = read_structure(file, kind=LOOP)["parts"].get("weights") if file.is_file() else None
        if saved is None:
            return
        every = range(len(models_of(self.accelerator)))
        files = {f"{model_name(n)}.": checkpoint / f"model{f'_{n}' if n else ''}.safetensors" for n in every}
        problems, fatal = self.proof.unlike(saved, files)
        had, has = len(list(checkpoint.glob("custom_checkpoint_*.pkl"))), len(registered_with(self.accelerator))
        if 0 < has != had:  # the manager registers one, if accelerate tells which there are
            problems.append(
                f"register_for_checkpointing() was given {has - 1} objects beside the manager, and {had - 1} when it "
                "was saved"
            )
        if fatal or (problems and self.settings.strict):
            raise ResumeMismatch(checkpoint, [*problems, *fatal], _ALIKE)
        for problem in shortened(problems):
            logger.warning("not exact: %s", problem)

    def check(self, checkpoint: Path, tree: Mapping[str, Any], present: Mapping[str, Any]) -> None:
        """Raise unless this run can continue from ``tree``; nothing is changed.

        Raises:
            ResumeMismatch: What breaks exactness, unless that is admitted; what is fatal in any case.
        """
        missing = [key for key in PARTS if key not in tree["parts"]]
        if missing:
            with saved_by_version(checkpoint, tree["environment"]):
                raise StateMismatch(str(checkpoint), missing=missing)
        self._change = self._world_size_change(checkpoint, tree, present)
        differences = compare_facts(tree, present)
        if self._change is not None:  # what the change has to do with has been converted
            differences = [one for one in differences if not one.name.endswith(_CONVERTED)]
        _, lacking = RngState.from_state_dict(tree["parts"]["randomness"])
        absent = absent_objects(self.settings.objects, tree["objects"])
        self.report = ResumeReport(checkpoint, strict=self.settings.strict, advice=NOT_STRICT)
        self.report.require([*absent, *(f"this machine has no {name}" for name in lacking)], differences)
        self.report.problems += unlike_kinds(tree.get("kinds", {}), present["kinds"])  # older checkpoints have none
        other, self.report.doubts = self.program.loaded(
            tree.get("program", {}), tree["parts"]["attributes"]
        )  # nor this
        self.report.problems += other
        self.report.problems += [] if self._change is None else [str(self._change)]
        if tree["parts"]["position"]["interrupted"] == "error":
            self.report.problems.append(LEFT_BY_ERROR)
        self.report.warn()

    def _world_size_change(
        self, checkpoint: Path, tree: Mapping[str, Any], present: Mapping[str, Any]
    ) -> Change | None:
        """The change to continue over, if there is one and the user wants to."""
        if tree["environment"]["world_size"] == self.ranks.world_size:
            return None
        change = change_of(self.accelerator, tree, present, elastic=self.settings.elastic)
        if self.settings.on_world_size_change == "error" and not self.settings.elastic:
            told = (
                f"the checkpoint was saved by {change.was} processes, and there are {change.now} now: each gets "
                "other rows and other random numbers"
            )
            advice = (
                'pass TrainingStateManager(on_world_size_change="continue") to resume anyway, not exactly; a run that '
                "is started with elastic=True can change it"
            )
            raise ResumeMismatch(checkpoint, [told, *change.problems], advice)
        if change.problems:
            raise ResumeMismatch(checkpoint, change.problems)
        return change

    def apply(self, checkpoint: Path, tree: Mapping[str, Any]) -> Proof:
        """Go on from ``tree``, after accelerate has loaded its own. Returns what was proved.

        Raises:
            ResumeMismatch: What accelerate loaded is not what was saved, which ``strict=False`` makes a warning.
        """
        parts, seed, change = tree["parts"], tree["arguments"]["seed"], self._change
        sharded = self.accelerator.distributed_type in _SHARDED
        unproved = None if change is None else self.proof.obstacle_to_resharding()
        proof, problems = self.proof.prove(
            parts["weights"],
            checkpoint,
            left_out=() if unproved is None else ("model", "optimizer"),
            optimizer_files=None if sharded else self._optimizer_files(checkpoint),
            saved_by=tree["environment"]["world_size"],
        )
        self.report.problems += [] if unproved is None else [f"not compared with what was saved: {unproved}"]
        with saved_by_version(checkpoint, tree["environment"]):
            problems += self.outside.load_state_dict(parts["outside"])
            inside = any(one["position"]["batch"] is not None for one in parts["position"]["loaders"].values())
            self.attributes.load_state_dict(parts["attributes"], inside=inside)
            self.best.load_state_dict(parts["best"])
        undone, other = self.program.applied()
        self.report.require(problems, undone)
        self.report.problems += other
        self.report.warn()
        no_effect = report_of_no_effect(undone, "after resume()", is_exact=not self.report.problems)
        if no_effect is not None:
            logger.warning("%s", no_effect)
        restore_objects(self.settings.objects, tree["objects"])
        self.loop.seed = seed
        rng, _ = RngState.from_state_dict(parts["randomness"])
        if change is None:
            with saved_by_version(checkpoint, tree["environment"]):
                self.loop.load_state_dict(parts["position"], rng)
            return proof
        if not self.settings.elastic:
            seed_all((seed, "rank", parts["position"]["step"], self.ranks.rank))
            rng = capture_rng()
        change.convert_schedulers(self.accelerator)
        self.accelerator.step = 0  # of the accumulation, of which a save begins a new one
        self.loop.load_state_dict(change.position, rng)
        return proof

    def _optimizer_files(self, checkpoint: Path) -> dict[str, Path]:
        count = range(len(optimizers_of(self.accelerator)))
        return {optimizer_name(n): checkpoint / (f"optimizer_{n}.bin" if n else "optimizer.bin") for n in count}


class Repeated:
    """Compares what was loaded with what the rest of the pass begins with."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._loaded: dict[str, Any] | None = None

    def loaded(self) -> None:
        """Everything is as it was saved."""
        self._loaded = self._marks()

    def begin_pass(self, inside: bool) -> None:
        """A pass is about to begin, or (``inside``) the rest of one."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or not inside:
            return
        now = self._marks()
        changed = [name for name, mark in loaded.items() if now.get(name, mark) != mark]
        if changed:
            logger.warning(
                "not exact: the program changes %s between resume() and the rest of the epoch, although the "
                "checkpoint already contains that change; make a change at the start of each epoch only if "
                "manager.progress.batch is 0",
                few(changed),
            )

    def _marks(self) -> dict[str, Any]:
        models = self._prepared.whole_models().items()
        tensors = {f"{name}.{key}": one for name, model in models for key, one in module_tensors(model).items()}
        whole = {name: one for name, one in tensors.items() if not (is_shared_out(one) or one.is_meta)}
        marks: dict[str, Any] = dict(sample_digests(whole))
        for name, optimizer in self._prepared.optimizers().items():
            for number, group in enumerate(getattr(optimizer, "param_groups", ())):
                numbers = {key: one for key, one in group.items() if type(one) in (int, float)}
                marks |= {f"{name}.param_groups[{number}].{key}": one for key, one in numbers.items()}
        return marks
