"""What the large files of a loop's checkpoint are made of, learned from a save that accelerate made itself.

Promise: a :class:`Template` is given only where every file of a model equals, byte for byte, an arrangement of its live
tensors, and every file of an optimizer the archive that is written here of the same state; for files whose names and
sizes alone are looked at, this holds once the comparisons that come with it have been run. All other files of
``accelerator.save_state`` are small, and accelerate continues writing them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import OPTIMIZER_NAME, SAFE_WEIGHTS_NAME, DistributedType

from hf_lifecycle.hosts.accelerate.intercept import models_of, optimizers_of
from hf_lifecycle.hosts.accelerate.prepared import model_name, optimizer_name
from hf_lifecycle.saving.files.archive import TorchArchive, plain_copy
from hf_lifecycle.saving.files.checkpoint_files import plan_of_archive, plan_of_layout, require_archive
from hf_lifecycle.saving.files.comparison import Comparison, comparison_of_archive, comparison_of_layout
from hf_lifecycle.saving.files.layout import NotLearned, SafetensorsLayout, layout_by_name, learn
from hf_lifecycle.saving.snapshots.image import Plan
from hf_lifecycle.saving.snapshots.live import live_tensors, model_tensors, strange_tensors, tensors_in
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.torch_internals import storage_id

__all__ = [
    "OTHERWISE",
    "Live",
    "ModelFile",
    "OptimizerState",
    "Template",
    "ingredients",
    "live_models",
    "numbered",
    "obstacle_to",
    "optimizer_states",
    "overridden_saves",
    "template_of",
]

Live = Mapping[str, torch.Tensor]  # a model's tensors, by each of their names

OTHERWISE = (
    "no background saves: save(wait=False) blocks until the checkpoint is written, as save() does; the "
    "checkpoints are the same"
)
_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_OWN = ("save_state", "get_state_dict")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The file of one model.

    Attributes:
        name: What it is called in the checkpoint.
        owner: What the model is called where its tensors are named, such as ``model 0``.
        prefix: What the file puts before the names of its tensors: that of the wrappers around it.
    """

    name: str
    owner: str
    prefix: str
    layout: SafetensorsLayout

    def name_of(self, tensor: str) -> str:
        """What the snapshot calls the tensor that the layout knows as ``tensor``."""
        return f"{self.owner}.{tensor.removeprefix(self.prefix)}"

    def comparison(self, tensors: Live) -> Comparison:
        """How to compare the file whose tensors are these, by their digests."""
        return comparison_of_layout(self.name, self.layout, _prefixed(tensors, self.prefix), self.name_of)

    def live(self, tensors: Live) -> list[LiveTensor]:
        """What a snapshot holds of the model, which has these tensors."""
        in_files = {name.removeprefix(self.prefix) for name in self.layout.names}
        return model_tensors(tensors, in_files, f"{self.owner}.")

    def plan(self, tensors: Live) -> Plan:
        """What the file is going to look like."""
        return plan_of_layout(self.name, self.layout, _prefixed(tensors, self.prefix))


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """The state of one optimizer at one moment.

    Attributes:
        name: What its values are named after, such as ``optimizer 0``.
        tree: The state, with containers of its own and tensors that lie where the live ones do.
    """

    file: str
    name: str
    tree: Any

    def live(self) -> list[LiveTensor]:
        """Its tensors."""
        return tensors_in(self.tree, self.name)

    def archive(self, folder: Path) -> TorchArchive:
        """What its file in this folder is made of."""
        return TorchArchive(self.tree, Path(self.file).stem).at(folder / self.file)


@dataclass(frozen=True, slots=True)
class Template:
    """The large files of a save.

    Attributes:
        folder: Where they were written, beside which the others will be.
    """

    folder: Path
    models: tuple[ModelFile, ...]
    ingredients: Any

    def tensors(self, models: Sequence[Live], optimizers: Sequence[OptimizerState]) -> list[LiveTensor]:
        """All that a snapshot consists of, where the models have these tensors and the optimizers these states."""
        pairs = zip(self.models, models, strict=True)
        of_models = [live for file, tensors in pairs for live in file.live(tensors)]
        return of_models + [live for one in optimizers for live in one.live()]

    def plans(self, models: Sequence[Live], optimizers: Sequence[OptimizerState]) -> list[Plan]:
        """What the files are going to look like."""
        of_models = [file.plan(tensors) for file, tensors in zip(self.models, models, strict=True)]
        return of_models + [plan_of_archive(one.file, one.archive(self.folder)) for one in optimizers]


def obstacle_to(accelerator: Any) -> str | None:
    """Why the saves of this accelerator cannot be made elsewhere, as far as it tells before one; None if unknown."""
    if accelerator.distributed_type not in _PLAIN:
        return f"{accelerator.distributed_type.value} writes its own files"
    return overridden_saves(accelerator)


def overridden_saves(accelerator: Any) -> str | None:
    """Why another than accelerate may write the files of this accelerator, or others than they are taken for."""
    own = [name for name in _OWN if getattr(type(accelerator), name) is not getattr(Accelerator, name)]
    if own:
        return f"{type(accelerator).__name__} overrides {', '.join(own)}"
    if not models_of(accelerator):
        return "the accelerator has prepared no model"
    return None


def live_models(accelerator: Any) -> list[Live]:
    """The tensors of each model."""
    return [live_tensors(unwrapped(model)) for model in models_of(accelerator)]


def ingredients(accelerator: Any, models: Sequence[Live]) -> Any:
    """What the template rests on, as far as it can be told cheaply: names, kinds and sharing of the models' tensors.

    Raises:
        NotLearned: A wrapper does not have its model among its modules.
    """
    prefixes = [_prefix(model) for model in models_of(accelerator)]
    return prefixes, [list(_kinds(tensors)) for tensors in models], len(optimizers_of(accelerator))


def _kinds(tensors: Live) -> Iterator[tuple[Any, ...]]:
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        shared_with = first.setdefault(storage_id(tensor), name)
        yield name, type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, shared_with


def _prefixed(tensors: Live, prefix: str) -> Live:
    return {prefix + name: tensor for name, tensor in tensors.items()} if prefix else tensors


def _prefix(model: torch.nn.Module) -> str:
    """What wrappers put before the names of the tensors of the model within."""
    inner = unwrapped(model)
    found = next((name for name, module in model.named_modules(remove_duplicate=False) if module is inner), None)
    if found is None:  # as accelerate.utils.compile_regions does, which copies the model around its compiled parts
        raise NotLearned(f"the model {type(inner).__name__} is inside an unknown wrapper")
    return f"{found}." if found else ""


def optimizer_states(accelerator: Any) -> list[OptimizerState]:
    """The state of each optimizer, as it is now.

    Raises:
        NotLearned: One holds what is neither a tensor nor plain.
    """
    states = []
    for number, optimizer in enumerate(optimizers_of(accelerator)):
        try:
            state = OptimizerState(
                f"{numbered(OPTIMIZER_NAME, number)}.bin", optimizer_name(number), plain_copy(optimizer.state_dict())
            )
            state.live()
        except TypeError as error:
            raise NotLearned(f"the state of {optimizer_name(number)} holds a {error}") from error
        states.append(state)
    return states


def numbered(name: str, number: int) -> str:
    """What accelerate calls the file of this model or optimizer, without its suffix."""
    return name if number == 0 else f"{name}_{number}"


def template_of(accelerator: Any, folder: Path, *, at_once: bool = False) -> tuple[Template, list[Comparison]]:
    """Learn from a save that lies in ``folder``, while everything is still as it was.

    Args:
        at_once: Whether they are compared with live tensors now, whatever these are called.

    Returns:
        The template, and what is to be compared before anything is saved by it.

    Raises:
        NotLearned: Something in it is not accounted for.
        OSError: A file cannot be read.
    """
    strange = strange_tensors(map(unwrapped, models_of(accelerator)))
    if strange is not None:
        raise NotLearned(strange)
    stem, _, suffix = SAFE_WEIGHTS_NAME.rpartition(".")
    files = {f"{numbered(stem, number)}.{suffix}": model for number, model in enumerate(models_of(accelerator))}
    states = optimizer_states(accelerator)
    expected = {*files, *(state.file for state in states)}
    present = {path.name for path in folder.iterdir() if path.suffix == f".{suffix}"} | {
        path.name for path in folder.glob(f"{OPTIMIZER_NAME}*.bin")
    }
    if present != expected:
        different = ", ".join(sorted(present ^ expected))
        raise NotLearned(f"accelerate did not write the expected files: {different}")
    models, tensors = [], live_models(accelerator)
    comparisons: list[Comparison] = []
    for number, (name, model) in enumerate(files.items()):
        prefix = _prefix(model)
        live = _prefixed(tensors[number], prefix)
        by_name = None if at_once else layout_by_name(folder / name, live)
        layout = learn(folder / name, live) if by_name is None else by_name
        models.append(ModelFile(name, model_name(number), prefix, layout))
        if by_name is not None:
            comparisons.append(models[-1].comparison(tensors[number]))
    for state in states:
        later = None if at_once else comparison_of_archive(state.file, state.archive(folder), state.live())
        if later is None:
            require_archive(folder / state.file, state.tree)
        else:
            comparisons.append(later)
    return Template(folder, tuple(models), ingredients(accelerator, tensors)), comparisons
