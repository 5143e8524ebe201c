"""A run of a loop: the loop, its checkpoints and its proofs, put together for ``TrainingStateManager``."""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_lifecycle.argument_checks import (
    given,
    read_amount,
    read_directory,
    read_flag,
    read_name,
    read_number,
    read_path,
)
from hf_lifecycle.checkpoint.directory.admission import require_checkpoint, require_whole
from hf_lifecycle.checkpoint.directory.manifest import manifest_path
from hf_lifecycle.checkpoint.files.additions import LOOP
from hf_lifecycle.engine.load_proof import LoadProof
from hf_lifecycle.engine.readable import require_readable
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.errors import UnsupportedTraining
from hf_lifecycle.hosts.accelerate.elastic import Elastic
from hf_lifecycle.hosts.accelerate.hooks import Hooks, refuse_hostile
from hf_lifecycle.hosts.accelerate.intercept import models_of, report_missing_names
from hf_lifecycle.hosts.accelerate.iteration.asked_by import OlderGenerators
from hf_lifecycle.hosts.accelerate.iteration.loaders import Loaders
from hf_lifecycle.hosts.accelerate.iteration.uneven import Uneven
from hf_lifecycle.hosts.accelerate.loop import Loop
from hf_lifecycle.hosts.accelerate.nodes import nodes_of, require_one_save, saves_on_each_node
from hf_lifecycle.hosts.accelerate.preemption import Preemption
from hf_lifecycle.hosts.accelerate.prepared import Prepared
from hf_lifecycle.hosts.accelerate.progress import Progress
from hf_lifecycle.hosts.accelerate.resume.restoring import NOT_STRICT, PARTS, Repeated, Restoring
from hf_lifecycle.hosts.accelerate.run_state.attributes import Attributes
from hf_lifecycle.hosts.accelerate.run_state.outside import Outside
from hf_lifecycle.hosts.accelerate.run_state.program import Program
from hf_lifecycle.hosts.accelerate.run_state.variables import ProgramVariables
from hf_lifecycle.hosts.accelerate.saves.rank_state import Carried, SavedPart
from hf_lifecycle.hosts.accelerate.saves.saves import Saves
from hf_lifecycle.hosts.accelerate.settings import RunSettings
from hf_lifecycle.hosts.accelerate.stopping import bind_to_ranks, decisions
from hf_lifecycle.mirror.latest import latest_checkpoint
from hf_lifecycle.mirror.node_directories import agreed_checkpoint
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.best import BestMetric
from hf_lifecycle.state.buckets import Buckets

__all__ = ["Run"]

logger = logging.getLogger("hf_lifecycle")


class Run:
    """One run of a loop.

    Args:
        directory: Where its checkpoints go; None where the caller saves with ``accelerator.save_state`` alone.
    """

    def __init__(
        self, accelerator: Any, directory: str | os.PathLike[str] | None, settings: RunSettings, best: BestMetric
    ):
        if not hasattr(accelerator, "register_save_state_pre_hook"):
            raise TypeError(f"accelerator must be an accelerate.Accelerator, got {accelerator!r}")
        directory = None if directory is None else read_directory("directory", directory)
        self.ranks = Ranks.current()
        self.ranks.begin()
        report_missing_names(accelerator)
        self._accelerator = accelerator
        self._settings = settings
        self._objects = dict(settings.objects)
        seed, self._attempt = self._agree(directory)
        self._loaders = Loaders(accelerator, self.ranks, self._objects, self._complain)
        self._loaders.elastic = settings.elastic
        self._stopping = decisions(self._objects.values())
        self.loop = Loop(accelerator, self._loaders, seed, lambda: any(one.should_stop for one in self._stopping))
        self._elastic = Elastic(accelerator, self.ranks, self.loop) if settings.elastic else None
        for decision in self._stopping:
            bind_to_ranks(decision, self.ranks)
        self._uneven = Uneven(self.ranks, lambda: models_of(accelerator), lambda: prepared.optimizers().values())
        self._buckets = Buckets()
        self._prepared = prepared = Prepared(accelerator, self._objects)
        self._proof = LoadProof(self.ranks, LOOP, prepared.trained)
        self._directory: RunDirectory | None = None
        if directory is not None:
            nodes, mirror = nodes_of(accelerator, self.ranks), settings.second_place
            self._directory = RunDirectory(
                directory, self.ranks, nodes=nodes, keep=settings.retention, mirror=mirror, recovers=True
            )
        self._outside = Outside(prepared, lambda: (self.progress.epoch, self.loop.steps.count, self.progress.batch))
        self._attributes = Attributes(prepared, lambda: self.progress.epoch)
        self._variables = ProgramVariables(self._known_values, Run._during.__code__)
        self._repeated = Repeated(prepared)
        program = Program(accelerator, prepared)
        self._generators = OlderGenerators()
        self.loop.at_pass += [self._attributes.begin_pass, self._variables.begin_pass]
        self.loop.at_pass += [self._repeated.begin_pass, self._generators.begin_pass, program.begin_pass]
        found: dict[str, SavedPart] = {"outside": self._outside, "attributes": self._attributes}
        found["variables"] = self._variables
        self._carried = Carried(accelerator, self.ranks, self.loop, best, self._objects, found, program, self._attempt)
        self._hooks = Hooks(accelerator, self, self.ranks)
        beside = (self._proof, self._carried, self._outside, self._buckets, self._hooks)
        self._saves = Saves(accelerator, self.ranks, self.loop, self._directory, *beside)
        where = self._directory
        self._preemption = None if where is None else Preemption(settings, self.loop, where, self._saves)
        self.loop.at_end.append(self._tell_end)
        self._began = time.monotonic()
        restored = (self._outside, self._attributes, program, best)
        self._restoring = Restoring(accelerator, self.ranks, self.loop, self._proof, *restored, settings)

    def _agree(self, directory: str | os.PathLike[str] | None) -> tuple[int, str]:
        """What all ranks have in common: the seed and the name of this run of the program.

        Raises:
            UnsupportedTraining: The ranks were given different directories, and not each node has its own.
        """
        own = {
            "directory": None if directory is None else os.path.abspath(directory),
            "objects": sorted(self._objects),
            "seed": torch.initial_seed() if self._settings.seed is None else self._settings.seed,
            "attempt": uuid.uuid4().hex,
        }
        told = self.ranks.gather(own, what="beginning the run")
        for key in ("objects",) if saves_on_each_node(self._accelerator) else ("directory", "objects"):
            if any(one[key] != told[0][key] for one in told):
                each = [f"rank {rank}: {key} {one[key]!r}" for rank, one in enumerate(told)]
                raise UnsupportedTraining(each, f"give every rank the same {key}")
        return int(told[0]["seed"]), str(told[0]["attempt"])

    @property
    def progress(self) -> Progress:
        return self.loop.progress

    def _known_values(self) -> list[Any]:
        """What variables of the program may hold, and others carry or name."""
        prepared = self._prepared
        return [*prepared.known(), *prepared.data().values(), *self._attributes.seeded()]

    # The loop

    def epochs(self, count: int, max_steps: int | None) -> Iterator[int]:
        read_amount("count", count, otherwise=" of epochs; for a part of an epoch, pass max_steps")
        if max_steps is not None:
            read_amount("max_steps", max_steps, otherwise=", or None for no limit")
        if self._saves.is_closed:
            raise ValueError("epochs() after close(): create a new TrainingStateManager")
        self._watch()
        self._variables.begin_run()
        return self._during(self.loop.epochs(count, max_steps))

    def batches(self, loader: Any, name: str | None) -> Iterator[tuple[int, Any]]:
        if isinstance(loader, type) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
            raise TypeError(f"loader must be iterable, such as a DataLoader, got {given(loader)}")
        if name is not None:
            read_name("name", name)
        if self._elastic is not None:
            self._elastic.begin(loader)
        self._proof.watch()
        self._outside.begin()
        self._watch()
        self._carried.program.ask(loader)
        for model in models_of(self._accelerator):
            self._buckets.watch(model)
        return self._during(self._uneven.during(self.loop.batches(loader, name, by=self._generators.asker())))

    def _watch(self, *, in_loop: bool = True) -> None:
        self._attributes.watch()
        if not self._saves.in_loop:
            self._carried.program.begin(in_loop=in_loop)

    def _during(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Go through a loop of the manager's, the outermost or one within it."""
        if not self._saves.in_loop:
            iterator = self._saves.during(iterator)
            if self._preemption is not None:
                iterator = self._preemption.during(iterator)
        yield from iterator

    def _complain(self, problem: str) -> None:
        if self._settings.strict:
            raise UnsupportedTraining([problem], NOT_STRICT)
        logger.warning("not exact: %s", problem)

    def _tell_end(self) -> None:
        if self._directory is None or not self._directory.is_open or self.loop.leaving:
            return
        for decision in self._stopping:
            if decision.should_stop:
                self._directory.tell("stopped", self.loop.steps.count, why=decision.reason)
        self._directory.tell("ended", self.loop.steps.count, seconds=time.monotonic() - self._began)

    # Saving

    def save(self, metric: float | None, epoch_is_over: bool | None, *, wait: bool) -> Path:
        """Save a checkpoint of this place of the loop."""
        judged = None if metric is None else float(read_number("metric", metric))
        if judged is not None and not math.isfinite(judged):
            logger.warning("save(metric=%s): not a finite number, so this checkpoint is never the best one", judged)
        over = None if epoch_is_over is None else read_flag("epoch_is_over", epoch_is_over)
        with self._uneven.saving(self.loop.steps.count):
            return self._saves.save(judged, over, wait=read_flag("wait", wait) or self._uneven.joins)

    def tree_to_save(self) -> dict[str, Any]:
        """Everything that this rank adds to a checkpoint."""
        return self._saves.tree_to_save()

    # Resuming

    def resume(self, checkpoint: str | os.PathLike[str] | None) -> Path | None:
        """Go on from ``checkpoint``, or from the newest that verifies; None where there is none."""
        directory = self._saves.directory("resume()")
        self._watch(in_loop=False)
        self.loop.steps.watch()
        self._saves.finish()
        directory.open()
        found = self._checkpoint(directory, checkpoint)
        self._began = at = time.monotonic()
        if found is None:
            logger.info("%s: no checkpoint yet, so training starts from step 0", directory.path)
            directory.tell("started", 0, attempt=self._attempt)
            return None
        with self.ranks.agree(what=f"resuming from {found.name}"):
            require_readable(found, self._accelerator, kind=LOOP)
            refuse_hostile(found)  # before load_state, which under FSDP and DeepSpeed runs the hooks late
            self._restoring.require_alike(found)
            self._accelerator.load_state(str(found))
        directory.begin(found)
        directory.tell(
            "resumed", self.loop.steps.count, seconds=time.monotonic() - at, path=found, attempt=self._attempt
        )
        return found

    def _checkpoint(self, directory: RunDirectory, named: str | os.PathLike[str] | None) -> Path | None:
        """What is resumed from: ``named``, or the newest that verifies, from the mirror where only that has it.

        Raises:
            DamagedCheckpoint: The one named is not whole. On other ranks than the first: ``RankFailed``.
            NoUsableCheckpoint: There are some, and all are damaged.
        """
        if named is None and directory.nodes.several:
            mirror = self._settings.second_place
            return agreed_checkpoint(directory.path, self.ranks, directory.nodes, mirror=mirror)
        if named is None:
            newest = latest_checkpoint(directory.path, mirror=self._settings.second_place)
            return None if newest is None else Path(newest)
        checkpoint = Path(read_path("checkpoint", named))
        leads = directory.nodes.leads
        require_one_save(checkpoint, self.ranks, directory.nodes)
        with self.ranks.agree(what=f"verifying {checkpoint.name}"):
            require_checkpoint(checkpoint)
            if leads and (manifest_path(checkpoint).is_file() or not checkpoint.is_dir()):
                require_whole(checkpoint)
            if leads and not checkpoint.is_dir():
                raise ValueError(
                    f"checkpoint: {checkpoint} is not a folder; leave it out to resume from the newest "
                    f"checkpoint of {directory.path}"
                )
        return Path(os.path.abspath(checkpoint))

    def check_tree(self, checkpoint: Path, tree: Mapping[str, Any]) -> None:
        """Raise unless this run can continue from ``tree``; nothing is changed."""
        if self._elastic is not None:
            self._elastic.begin()
        self._saves.before_loading()
        self._attributes.watch()
        self._restoring.check(checkpoint, tree, self._facts_like(tree))

    def _facts_like(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The facts of now. A seed that nobody gave is taken from the checkpoint."""
        facts = self._carried.facts(self._prepared.plain.all())
        if self._settings.seed is None:
            facts["arguments"]["seed"] = tree["arguments"]["seed"]
        return facts

    def apply_tree(self, checkpoint: Path, tree: Mapping[str, Any]) -> None:
        """Go on from ``tree``, after accelerate has loaded its own."""
        proof = self._restoring.apply(checkpoint, tree)
        self._variables.load_state_dict(tree["parts"]["variables"])
        self._repeated.loaded()
        self._generators.loaded()
        self._buckets.begin_anew()
        at = self.progress
        self._restoring.report.finish(
            f"step {at.step}: epoch {at.epoch}, batch {at.batch}",
            tree["identity"],
            attempt=self._attempt,
            restored=[*PARTS, *(f"objects: {name}" for name in self._objects)],
            proof=proof,
            seconds=time.monotonic() - self._began,
            directory=self._directory.path if self._directory is not None and self._directory.nodes.leads else None,
        )

    def close(self) -> None:
        """Give everything back: the loaders, the hooks, the directory.

        Raises:
            SaveFailed: The save that was in flight went wrong.
        """
        self._saves.is_closed = True
        self.loop.close()
        if self._elastic is not None:
            self._elastic.close()
        self._hooks.close()
        self._outside.close()
        try:
            self._saves.close()
        finally:
            if self._directory is not None:
                self._directory.close()
