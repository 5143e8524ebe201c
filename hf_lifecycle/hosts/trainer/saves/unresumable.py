"""What Trainer saves and cannot continue from, found while there is time to act."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_lifecycle.checkpoint.files.safetensors_file import read_header
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.hosts.trainer.method_patching import overridden
from hf_lifecycle.hosts.trainer.resume.repair import unfiled_parameters
from hf_lifecycle.messages import few
from hf_lifecycle.saving.carrying import leaves_of
from hf_lifecycle.saving.files.loadable import Loadable
from hf_lifecycle.state.fingerprint import is_shared_out
from hf_lifecycle.state.objects import Stateful
from hf_lifecycle.state.proof import unwrapped

__all__ = ["Unresumable", "adapters_trainer_cannot_load"]

logger = logging.getLogger("hf_lifecycle")

# Files beside the weights with a suffix that files of weights have, too.
_WRAPPER = "_checkpoint_wrapped_module"  # of torch's activation checkpointing; peft does not look behind it
_NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")


class Unresumable:
    """What the checkpoints of one training lack, or hold in vain.

    Args:
        objects: What the user carries, which is no lack.
    """

    def __init__(self, objects: Mapping[str, Stateful]) -> None:
        self._objects = objects
        self.files = Loadable("Trainer")
        self._told: set[str] = set()

    def look(self, folder: Path, trainer: Any) -> None:
        """Look at what Trainer has just written into ``folder``; on the rank that writes. Each thing is told once."""
        self.files.look_at_files(folder, "optimizer.pt", "scheduler.pt")
        if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
            return  # files of their own, by names of their own
        for kind, problem in (*_lacking_files(folder, trainer), *_lacking_weights(folder, trainer, self._objects)):
            if kind not in self._told:
                self._told.add(kind)
                logger.warning("not exact: %s", problem)


def _lacking_files(folder: Path, trainer: Any) -> Iterator[tuple[str, str]]:
    """The files of optimizer and scheduler that an override leaves out; none where it loads what it writes, too."""
    own = overridden(trainer, ("_save_optimizer_and_scheduler", "_save_scheduler"))
    if not own or trainer.args.save_only_model or _loads_itself(trainer, "_load_optimizer_and_scheduler"):
        return
    wanted = {"optimizer.pt": trainer.optimizer, "scheduler.pt": trainer.lr_scheduler}
    absent = [name for name, one in wanted.items() if one is not None and not (folder / name).is_file()]
    if absent:
        yield (
            "optimizer",
            f"{folder.name} has no {' or '.join(absent)}, since {_named(trainer)} does not write it, so a resume "
            "will be refused: call super() there, or resume with LifecycleCallback(strict=False) and a new optimizer",
        )


def _lacking_weights(folder: Path, trainer: Any, objects: Mapping[str, Stateful]) -> Iterator[tuple[str, str]]:
    """What is trained and an override leaves out of the weights; none where it loads what it writes, too."""
    own = overridden(trainer, ("save_model", "_save"))
    if not own or _loads_itself(trainer, "_load_from_checkpoint"):
        return
    model = unwrapped(trainer.model)
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    files = [path for path in files if not path.name.startswith(_NO_WEIGHTS) and path.parent.name != "lifecycle"]
    if any(path.suffix != ".safetensors" for path in files) or any(map(is_shared_out, model.parameters())):
        return
    try:
        sizes = {name: tensor.elements for path in files for name, tensor in read_header(path).items()}
    except (StateFileError, OSError):
        return
    state = model.state_dict(keep_vars=True)
    filed = {state[name].data_ptr() for name in sizes.keys() & state.keys()}
    given = [leaf for one in objects.values() for leaf in leaves_of(dict(one.state_dict()))]
    filed |= {leaf.data_ptr() for leaf in given if isinstance(leaf, torch.Tensor)}
    carried = unfiled_parameters(model)
    lacking = {
        name: one.numel()
        for name, one in model.named_parameters()
        if one.requires_grad and one.data_ptr() not in filed and name not in carried
    }
    # Files may have other names, as adapters' do; what they hold beside the names that are known may be it then.
    if sum(lacking.values()) > sum(size for name, size in sizes.items() if name not in state):
        yield (
            "weights",
            f"the weights in {folder.name} lack {len(lacking)} trained tensors of the model ({few(list(lacking))}), "
            f"since {_named(trainer)} does not write them, so a resume will be refused: write them too, or pass "
            'their owner as objects={"name": it}',
        )


def _loads_itself(trainer: Any, name: str) -> bool:
    """Whether the class has this method of its own; on the trainer itself hangs one of ours."""
    return getattr(type(trainer), name, None) is not getattr(Trainer, name, None)


def _named(trainer: Any) -> str:
    return type(trainer).__name__


def adapters_trainer_cannot_load(trainer: Any) -> list[str]:
    """A sentence for each adapter of PEFT whose file does not, or at some step not any more, fit the saved model."""
    model, found = unwrapped(trainer.model), []
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    is_lost = str(getattr(plugin, "state_dict_type", "")).endswith("SHARDED_STATE_DICT") and any(
        _WRAPPER in name for name, _ in model.named_modules()
    )
    adapters = getattr(model, "peft_config", None) or {}
    every = [f"{name}." for name, one in model.named_parameters() if one.requires_grad] if len(adapters) > 1 else []
    trained = [name for name in adapters if any(f".{name}." in one for one in every)]
    if len(trained) > 1 and not overridden(trainer, ["create_optimizer"]):
        found.append(
            f"adapters {few(trained)} are trained at once, and Trainer activates one of them when it resumes, so a "
            "resume will be refused: activate all of them again in create_optimizer() of a subclass"
        )
    for name, config in adapters.items():
        if is_lost:
            found.append(
                f"adapter {name!r}: with SHARDED_STATE_DICT and fsdp_config's activation_checkpointing, Trainer saves "
                "no tensor of it, so a resume will be refused: set state_dict_type to FULL_STATE_DICT in fsdp_config"
            )
        if getattr(config, "prefix_projection", False):
            found.append(
                f"adapter {name!r}: peft saves a prefix with a projection in a form that it cannot load, so a resume "
                "will fail: set prefix_projection=False"
            )
        if getattr(config, "peft_type", None) == "ADALORA" and config.target_r < config.init_r:
            found.append(
                f"adapter {name!r}: from step {config.total_step - config.tfinal} on, when AdaLoRA has decided its "
                "ranks, peft cannot load its file into a new model, so a resume will fail: resume from a checkpoint "
                "before that step"
            )
    return found
