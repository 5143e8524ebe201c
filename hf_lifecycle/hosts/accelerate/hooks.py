"""What ``accelerator.save_state`` and ``load_state`` carry beyond accelerate's own files, and what they refuse.

One object is registered with ``register_for_checkpointing``; its state is no more than the identity of the save. A save
hook lets every rank write its file (:mod:`hf_lifecycle.checkpoint.files.additions`). Loading has three acts: the load
hook verifies the checkpoint, reads that file and refuses, before accelerate unpickles anything, every pickle that could
run code; accelerate loads; and the registered object, which accelerate loads last, checks the identity and has
everything else applied.

Under FSDP and DeepSpeed accelerate loads models before any load hook runs; ``resume()`` looks at the files before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hf_lifecycle.checkpoint.directory.admission import require_whole
from hf_lifecycle.checkpoint.directory.manifest import manifest_path
from hf_lifecycle.checkpoint.directory.pickles import refuse_names
from hf_lifecycle.checkpoint.directory.verification import forget
from hf_lifecycle.checkpoint.files.additions import LOOP, rank_file
from hf_lifecycle.checkpoint.files.legacy import NUMPY_NAMES
from hf_lifecycle.checkpoint.files.sharded_files import METADATA, reason_to_refuse_shards
from hf_lifecycle.checkpoint.files.statefile import read_tree, write_tree
from hf_lifecycle.checkpoint.files.structure import DamagedStateError, ForeignStateError
from hf_lifecycle.checkpoint.files.torch_file import load_safely
from hf_lifecycle.copies import keep_out, let_in
from hf_lifecycle.engine.resume_report import reading_unverified
from hf_lifecycle.errors import ResumeMismatch, StateFileError
from hf_lifecycle.hosts.accelerate.intercept import unregister
from hf_lifecycle.hosts.accelerate.nodes import writes
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["Hooks", "refuse_hostile", "save_into"]

_MARK = "_hf_lifecycle_hooks"  # on an accelerator: the hooks that are registered with it
_PICKLES = ("*.pkl", "*.bin", "*.pt", "*.pth")
_CUSTOM = "custom_checkpoint_"  # what accelerate loads with weights_only=False


class Host(Protocol):
    """Whose state the hooks carry."""

    def tree_to_save(self) -> dict[str, Any]:
        """Everything this rank adds, with its ``identity``; raises where no save is possible."""

    def check_tree(self, checkpoint: Path, tree: Mapping[str, Any]) -> None:
        """Raise unless the run can continue from ``tree``; nothing is changed."""

    def apply_tree(self, checkpoint: Path, tree: Mapping[str, Any]) -> None:
        """Go on from ``tree``; accelerate has loaded its own."""


class Hooks:
    """Registers ``host`` with ``accelerator``.

    Raises:
        ValueError: The accelerator carries the state of another host.
    """

    def __init__(self, accelerator: Any, host: Host, ranks: Ranks) -> None:
        if getattr(accelerator, _MARK, None) is not None:
            raise ValueError("this accelerator has a TrainingStateManager already; close() it first, or use it")
        self._accelerator = accelerator
        self._host = host
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self._ranks = ranks
        self._verifies = writes(accelerator, ranks)
        self._identity: dict[str, Any] = {}
        self._is_deferred = False  # this rank's file is written later, by another
        self._loaded: tuple[Path, dict[str, Any]] | None = None
        self._handles = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]
        accelerator.register_for_checkpointing(self)
        setattr(accelerator, _MARK, self)
        keep_out(accelerator, self._leave)

    def _leave(self, copied: dict[str, Any]) -> None:
        """Take what was registered out of the attributes of a copy of the accelerator."""
        copied.pop(_MARK, None)
        hung = {id(handle.hooks_dict_ref()): handle.id for handle in self._handles}
        for name, value in copied.items():
            if id(value) in hung:
                copied[name] = type(value)(item for item in value.items() if item[0] != hung[id(value)])
        unregister(copied, self)

    def obstacle(self) -> str | None:
        """Why saves cannot be made elsewhere: who takes part in one beside the manager."""
        if len(self._handles[0].hooks_dict_ref()) > 1:
            return "another save hook is registered with the accelerator, and may write weights"
        return None

    def _save(self, models: Any, weights: Any, output_dir: str) -> None:  # noqa: ARG002
        if self._is_deferred:
            return
        tree = self._host.tree_to_save()
        file = rank_file(Path(output_dir), self._rank)
        file.parent.mkdir(exist_ok=True)
        write_tree(file, tree, kind=LOOP)
        self._identity = tree["identity"]

    @contextmanager
    def deferred(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Let this rank's file, which has this identity, be left to the caller within the block."""
        self._identity, self._is_deferred = dict(identity), True
        try:
            yield
        finally:
            self._is_deferred = False

    def state_dict(self) -> dict[str, Any]:
        """What ties accelerate's files to those of the ranks."""
        return dict(self._identity)

    def _load(self, models: Any, input_dir: str) -> None:  # noqa: ARG002
        checkpoint = Path(input_dir)
        self._require_whole(checkpoint)
        refuse_hostile(checkpoint)
        tree = self._read(checkpoint)
        self._host.check_tree(checkpoint, tree)
        self._loaded = checkpoint, tree

    def _require_whole(self, checkpoint: Path) -> None:
        """Every byte, where there is a manifest. What plain ``save_state`` wrote has none; it is proved once loaded."""
        with self._ranks.agree(what="verifying the checkpoint"):
            if self._verifies and manifest_path(checkpoint).is_file():
                require_whole(checkpoint)

    def _read(self, checkpoint: Path) -> dict[str, Any]:
        """This rank's tree; rank 0's where other processes saved than there are now."""
        file = rank_file(checkpoint, self._rank)
        if not file.is_file():
            file = rank_file(checkpoint, 0)
        if not file.is_file():
            raise ResumeMismatch(
                checkpoint,
                [f"{file}: missing: the checkpoint was saved without TrainingStateManager"],
                "to continue from accelerate's own files, load them before you create the manager",
            )
        with reading_unverified(checkpoint):
            tree = read_tree(file, kind=LOOP)
        moved = tree["environment"]["world_size"] != self._world_size
        if tree["shared"] or moved:
            first = read_tree(rank_file(checkpoint, 0), kind=LOOP)
            tree["objects"] |= {name: first["objects"][name] for name in tree["shared"]}
            return first if moved else tree
        return tree

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Apply what :meth:`_load` read.

        Raises:
            ResumeMismatch: The files are of two saves, or what was loaded is not what was saved.
        """
        assert self._loaded is not None
        (checkpoint, tree), self._loaded = self._loaded, None
        if any(state.get(key) != tree["identity"][key] for key in ("attempt", "save")):  # ranks may have unlike steps
            own = f"{tree['identity']} in the file of rank {self._rank}, {dict(state)} in accelerate's"
            raise ResumeMismatch(
                checkpoint, [f"its files belong to two different saves: {own}"], "resume from another checkpoint"
            )
        forget()  # what is loaded later was read long ago then
        self._host.apply_tree(checkpoint, tree)

    def close(self) -> None:
        """Take back what was registered."""
        let_in(self._accelerator, self._leave)
        for handle in self._handles:
            handle.remove()
        unregister(vars(self._accelerator), self)
        if getattr(self._accelerator, _MARK, None) is self:
            delattr(self._accelerator, _MARK)


def save_into(accelerator: Any, folder: Path) -> None:
    """``accelerator.save_state`` into this folder, also where accelerate was told to name its folders itself."""
    config = accelerator.project_configuration
    names_itself, config.automatic_checkpoint_naming = config.automatic_checkpoint_naming, False
    try:
        accelerator.save_state(str(folder))
    finally:
        config.automatic_checkpoint_naming = names_itself


def refuse_hostile(checkpoint: Path) -> None:
    """Look at every pickle in a checkpoint, executing nothing.

    Raises:
        StateFileError: One names what could run code, or cannot be read.
    """
    for path in sorted(path for pattern in _PICKLES for path in checkpoint.rglob(pattern)):
        if not path.is_file():
            continue
        try:
            refuse_names(path)
            if path.name.startswith(_CUSTOM):
                with open(path, "rb") as file:
                    load_safely(file, NUMPY_NAMES)
        except DamagedStateError as error:
            advice = "; if it is your own class, allow it with torch.serialization.add_safe_globals"
            raise StateFileError(path, f"{error}{advice if isinstance(error, ForeignStateError) else ''}") from error
    for path in sorted(path for pattern in METADATA for path in checkpoint.rglob(pattern)):
        if (reason := reason_to_refuse_shards(path)) is not None:
            raise StateFileError(path, reason)
