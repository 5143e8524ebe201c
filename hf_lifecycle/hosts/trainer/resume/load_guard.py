"""Nothing is loaded from a checkpoint before every byte of it was verified.

Trainer loads the model from the directory that ``train()`` is given before it raises any event. So the one trainer that
the callback was made part of has its loading methods wrapped: the checkpoint is verified, and its pickles are looked
at, first. Where the callback was added later, or where Trainer loads by another way, that is done when training begins,
before anything of ours is loaded, and said.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_lifecycle.checkpoint.directory.admission import require_whole
from hf_lifecycle.checkpoint.directory.pickles import refused_pickles
from hf_lifecycle.checkpoint.directory.verification import forget
from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_structure
from hf_lifecycle.engine.readable import require_readable, unlike_groups, unlike_shapes, unlike_tensors
from hf_lifecycle.engine.resume_report import reading_unverified
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.hosts.trainer.host import Loaded, before_loading, path_given_to_train, trainer_in, training_frame
from hf_lifecycle.hosts.trainer.method_patching import MethodPatches
from hf_lifecycle.hosts.trainer.resume.optimizer_settings import keep_groups
from hf_lifecycle.hosts.trainer.resume.schedule_dry_run import DryRun
from hf_lifecycle.hosts.trainer.run_state.position import position_from
from hf_lifecycle.mirror.node_directories import common_checkpoint
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.rank_watch import RankWatch
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.proof import unwrapped

__all__ = ["LoadGuard"]

_ALIKE = (
    "make the model and the optimizer as the script that saved did; to train others from these weights, load "
    "them with from_pretrained() and begin in another output_dir"
)

logger = logging.getLogger("hf_lifecycle")

# What load_best_model_at_end, and our proof after it, read: not the optimizer, which is the most of a checkpoint, but
# where DeepSpeed has it with the model.
_OF_THE_MODEL = (
    "*.safetensors",
    "*.bin",
    "*.json",
    "lifecycle/*",
    "pytorch_model_fsdp_*/*",
    "global_step*/*",
    "latest",
)


class LoadGuard:
    """Lets whole checkpoints through."""

    def __init__(self) -> None:
        self._passed: Path | None = None  # in the start under way
        self._schedule: DryRun | None = None  # as it was made in it
        self._watch: RankWatch | None = None  # of the ranks that load, until training begins

    def __getstate__(self) -> dict[str, Any]:
        return {"_passed": None, "_schedule": None, "_watch": None}

    def attach(self, method: str, callback: TrainerCallback) -> None:
        """Stand before the loading methods of the trainer that runs ``method``, for as long as it has ``callback``."""
        trainer = trainer_in(method)
        if trainer is None:
            return
        before_loading(trainer, _Check(self, callback))
        if method == "__init__" and _on_each_node(trainer.args):
            MethodPatches().replace(trainer, "train", _from_one_step(trainer.args))

    def close(self, args: TrainingArguments, resume_from: str | PathLike[str] | None) -> None:
        """Training begins: look at what has not come through, and forget what has.

        Raises:
            DamagedCheckpoint: Some file is not what was saved.
        """
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        given = path_given_to_train()
        if given is not None and given != self._passed:
            self.admit(args, given)
            logger.warning(
                "%s: Trainer loaded it before it could be verified; it is intact. Pass LifecycleCallback to "
                "Trainer(callbacks=[...]) instead of add_callback, so that checkpoints are verified before they are "
                "loaded",
                given,
            )
        if resume_from is not None and Path(resume_from) != given:
            self.admit(args, Path(resume_from))
        self._passed = None
        forget()  # what is loaded at the end, or by the next training, was read long ago then

    def take_schedule(self) -> DryRun | None:
        """The scheduler as it was before this start loaded it; None where it loaded none, or it cannot be copied."""
        made, self._schedule = self._schedule, None
        return made

    def look_at_schedule(self, trainer: Any) -> Callable[[Any], Any]:
        """The scheduler has been made, and is about to be loaded. Returns what is to be done when it has been."""
        self._schedule = DryRun.of(trainer.lr_scheduler, trainer.optimizer, trainer)
        return keep_groups(trainer.optimizer)

    def watch_ranks(self) -> None:
        """The ranks are about to load, and then to wait for each other in what Trainer and torch do."""
        ranks = Ranks.current()
        if ranks.world_size > 1 and self._watch is None:
            self._watch = RankWatch(ranks, training_frame())

    def admit(self, args: TrainingArguments, checkpoint: Path, only: Sequence[str] = ()) -> None:
        """Return if ``checkpoint`` is whole; on several ranks, all of them look through the eyes of one.

        Raises:
            DamagedCheckpoint: It is not, or was moved aside because it is not.
            RankFailed: The rank that looked found that.
            ResumeMismatch: Each node has its own, and they are of different steps.
        """
        ranks = Ranks.current()
        if _on_each_node(args):
            _require_one_step(args, checkpoint.name, ranks)
        with ranks.agree(what="verifying the checkpoint"):
            if args.should_save:
                require_whole(checkpoint, only=only, progress=not args.disable_tqdm, also=refused_pickles)
        self._passed = checkpoint


_newest_to_trainer: Callable[[str], str | None] = get_last_checkpoint


def _on_each_node(args: TrainingArguments) -> bool:
    return args.save_on_each_node and Ranks.current().world_size > 1


def _from_one_step(args: TrainingArguments) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What makes of ``train()`` one that compares, on every rank, where the nodes resume from.

    Trainer itself raises on a node that has no checkpoint, while the others load theirs, and wait for it in vain.
    """

    def make(own: Callable[..., Any]) -> Callable[..., Any]:
        def method(resume_from_checkpoint: Any = None, *given: Any, **named: Any) -> Any:
            place = resume_from_checkpoint or None
            if place is True:
                directory = str(args.output_dir)
                place = _newest_to_trainer(directory) if os.path.isdir(directory) else None
            _require_one_step(args, None if place is None else Path(place).name, Ranks.current())
            return own(resume_from_checkpoint, *given, **named)

        return method

    return make


def _require_one_step(args: TrainingArguments, name: str | None, ranks: Ranks) -> None:
    """Raise, on every rank, where nodes that have their own directories would load different steps."""
    steps = ranks.gather(name, what="comparing the steps that the nodes resume from")
    if len(set(steps)) == 1:
        return
    assert args.output_dir is not None
    nodes = Nodes.of(ranks, writes=args.should_save)
    common = common_checkpoint(Path(os.path.abspath(args.output_dir)), ranks, nodes)
    advice = "pass resume_from_checkpoint=latest_checkpoint(args.output_dir, save_on_each_node=True) to train()"
    raise ResumeMismatch(
        None,
        [f"rank {rank} resumes from {step or 'no checkpoint'}" for rank, step in enumerate(steps)],
        f"{advice}: every node has {common.name} intact" if common is not None else advice,
    )


def _require_loadable(trainer: Any, checkpoint: Path, what: Loaded) -> None:
    """Raise ``ResumeMismatch`` where Trainer would end with an error amid loading this."""
    if (file := rank_file(checkpoint, 0)).is_file():
        with reading_unverified(checkpoint):
            saved = read_structure(file, kind=TRAINER)["parts"].get("weights", {"model": (), "optimizer": ()})
        model, groups = unwrapped(trainer.model), {"optimizer": trainer.optimizer}
        if what == "model":
            files = [path for name in ("model*", "adapter_model") for path in checkpoint.glob(f"{name}.safetensors")]
            problems = [one for path in sorted(files) for one in unlike_shapes(model, path)]
            if not isinstance(model, PreTrainedModel) and not hasattr(model, "peft_config"):
                problems += unlike_tensors({"": model}, saved["model"], only_lacking=True)
        elif problems := unlike_groups(groups, saved["optimizer"]):
            problems = [*unlike_tensors({"": model}, saved["model"]), *problems]
            if len(getattr(model, "peft_config", ())) > 1:
                problems.append("of several adapters that are trained at once, Trainer activates one when it resumes")
        if problems:
            raise ResumeMismatch(checkpoint, problems, _ALIKE)


class _Check:
    """What the wrapped methods of a trainer call."""

    def __init__(self, gate: LoadGuard, callback: TrainerCallback) -> None:
        self._gate = gate
        self._callback = callback

    def __call__(self, trainer: Any, checkpoint: Path, what: Loaded) -> Callable[[Any], Any] | None:
        if not any(other is self._callback for other in trainer.callback_handler.callbacks):
            return None  # it was removed
        if what == "optimizer":
            _require_loadable(trainer, checkpoint, what)
            return self._gate.look_at_schedule(trainer)
        if what == "position":
            return position_from(trainer, checkpoint)
        self._gate.admit(trainer.args, checkpoint, _OF_THE_MODEL if what == "best" else ())
        if what == "model":
            require_readable(checkpoint, trainer.accelerator, kind=TRAINER)
            _require_loadable(trainer, checkpoint, what)
        if what != "best":
            self._gate.watch_ranks()
        return None
