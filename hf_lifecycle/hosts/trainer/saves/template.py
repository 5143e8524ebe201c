"""What a save of this trainer consists of, learned from one that Trainer made itself.

Promise: a :class:`Template` is given only where every file that Trainer's ``save_model`` and
``_save_optimizer_and_scheduler`` wrote is accounted for: the model's tensors each equal a live one, byte for byte; the
optimizer's and the scheduler's archives are, byte for byte, those that are written here of the same state; everything
else stays the same from save to save, as long as what it is made of does. Of large files, names and sizes alone are
looked at while training waits: for them this holds once the comparisons that come with the template have been run. What
Trainer writes beside these (the scaler, and random numbers that are not the usual ones) it continues writing itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lifecycle.hosts.trainer.intercept import LOAD_BEST, SAVE_MODEL, SAVE_OPTIMIZER
from hf_lifecycle.hosts.trainer.method_patching import overridden, replaced
from hf_lifecycle.hosts.trainer.saves.small_files import Owned, own_configuration, tokenizer_of, watching_owner
from hf_lifecycle.hosts.trainer.saves.withheld import learned_rng_file
from hf_lifecycle.saving.files.archive import TorchArchive, plain_copy
from hf_lifecycle.saving.files.checkpoint_files import plan_of_archive, plan_of_layout, require_archive
from hf_lifecycle.saving.files.comparison import Comparison, comparison_of_archive, comparison_of_layout
from hf_lifecycle.saving.files.layout import NotLearned, SafetensorsLayout, layout_by_name, learn
from hf_lifecycle.saving.snapshots.image import Plan
from hf_lifecycle.saving.snapshots.live import computed_state, live_tensors, strange_tensors, tensors_in
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.reachable import attributes_of

__all__ = [
    "ARGUMENTS",
    "Observed",
    "Template",
    "files_of_model",
    "ingredients",
    "observe",
    "obstacle_to",
    "other_methods",
    "overridden_writers",
    "template_of",
]

ARGUMENTS = "training_args.bin"
_OPTIMIZER = "optimizer.pt"
_SCHEDULER = "scheduler.pt"
_MOST_STATIC = 64 << 20
# The suffixes of files that hold weights, which are never the same from save to save.
_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".h5", ".msgpack", ".gguf", ".onnx"})
_OF_A_RANK = re.compile(r"rng_state_\d+\.pth")  # each rank writes its own, whenever it comes to that
_OF_A_TOKENIZER = ("padding", "truncation", "normalizer", "pre_tokenizer", "post_processor", "decoder")
_MOST_ITEMS = 1000
_ITS_OWN = (*SAVE_MODEL, SAVE_OPTIMIZER)


@dataclass(slots=True)
class Observed:
    """The files that each of Trainer's methods wrote, by their path in the checkpoint."""

    checkpoint: Path | None = None
    of_model: frozenset[str] = frozenset()
    of_optimizer: frozenset[str] = frozenset()
    owned: Owned = field(default_factory=Owned)


@dataclass(frozen=True, slots=True)
class Template:
    """The files of a save.

    Attributes:
        folder: Where they were written, beside which the others will be.
        static: Content of what stays the same, by path.
        owned: The files beside these that their owner writes at each save.
        rng_file: The file of random numbers, where it has what
            :func:`~hf_lifecycle.hosts.trainer.saves.withheld.rng_states` gives.
        ingredients: What the static files are made of, and what the layouts rest on.
    """

    folder: Path
    static: Mapping[str, bytes]
    owned: Owned
    layouts: Mapping[str, SafetensorsLayout]
    has_optimizer: bool
    has_scheduler: bool
    has_arguments: bool
    rng_file: str | None
    ingredients: tuple[Any, ...]

    @property
    def names(self) -> frozenset[str]:
        """The model's tensors that its files are made of."""
        return frozenset().union(*(layout.names for layout in self.layouts.values()))

    def plans(self, live: Mapping[str, torch.Tensor], optimizer: Any) -> list[Plan]:
        """What the large files are going to look like, made of these tensors and this state of the optimizer."""
        of_model = [plan_of_layout(name, layout, live) for name, layout in self.layouts.items()]
        if self.has_optimizer:
            archive = TorchArchive(optimizer, "optimizer").at(self.folder / _OPTIMIZER)
            return [*of_model, plan_of_archive(_OPTIMIZER, archive)]
        return of_model


def obstacle_to(trainer: Any) -> str | None:
    """Why the saves of this trainer cannot be made elsewhere, if that is known before the first."""
    if (others := other_methods(trainer)) is not None:
        return others
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP1 writes its own files"
    model = unwrapped(trainer.model)
    return overridden_writers(model) or computed_state([model]) or strange_tensors([model])


def other_methods(trainer: Any) -> str | None:
    """Which of Trainer's methods that save are not its own."""
    absent = [name for name in (*_ITS_OWN, LOAD_BEST) if not hasattr(trainer, name)]
    if absent:  # what reads the best checkpoint has to wait for the save in flight
        return f"{type(trainer).__name__} has no {', '.join(absent)}"
    own = overridden(trainer, _ITS_OWN)
    return f"{type(trainer).__name__} overrides {', '.join(own)}" if own else None


def overridden_writers(model: torch.nn.Module) -> str | None:
    """What of a model has a way of its own to be written by ``save_pretrained``."""
    for module in model.modules():
        saves = getattr(type(module), "save_pretrained", None)
        if "save_pretrained" in vars(module) or (
            saves is not None
            and saves is not PreTrainedModel.save_pretrained
            and (module is model or isinstance(module, PreTrainedModel))
            and not str(getattr(saves, "__module__", "")).startswith("peft.")
        ):
            return f"{type(module).__name__} overrides save_pretrained"
    return own_configuration(model)


def observe(trainer: Any, save: Callable[[], object]) -> Observed:
    """Run ``save``, and see which of Trainer's methods writes which files."""
    seen = Observed()

    def watching(which: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(own: Callable[..., Any]) -> Callable[..., Any]:
            def method(output_dir: str, *args: Any, **kwargs: Any) -> Any:
                folder = Path(output_dir)
                before = frozenset(_files(folder))
                result = own(output_dir, *args, **kwargs)
                seen.checkpoint = folder
                setattr(seen, which, frozenset(_files(folder)) - before)
                return result

            return method

        return make

    methods = {SAVE_MODEL[0]: watching("of_model"), SAVE_OPTIMIZER: watching("of_optimizer")}
    with replaced(trainer, **methods), watching_owner(trainer, _files) as seen.owned:
        save()
    return seen


def _files(folder: Path) -> Iterator[str]:
    """The files of a checkpoint, but for those that other ranks may be writing into it at this moment."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return (name for name in names if not _OF_A_RANK.fullmatch(name))


def template_of(trainer: Any, seen: Observed, *, at_once: bool = False) -> tuple[Template, list[Comparison]]:
    """Learn from a save that was just made, while everything is still as it was.

    Args:
        at_once: Whether large files are compared with live tensors now, whatever they are called.

    Returns:
        The template, and what is to be compared before anything is saved by it.

    Raises:
        NotLearned: Something in it is not accounted for.
        TypeError: The optimizer's state holds what is neither a tensor nor plain.
        OSError: A file cannot be read.
    """
    folder = seen.checkpoint
    if folder is None or not seen.of_model:
        raise NotLearned("Trainer's save wrote no model")
    model = unwrapped(trainer.model)
    live = live_tensors(model)
    static, weights = files_of_model(seen)
    layouts: dict[str, SafetensorsLayout] = {}
    comparisons: list[Comparison] = []
    for name in weights:
        found = None if at_once else layout_by_name(folder / name, live)
        if found is not None:
            comparisons.append(comparison_of_layout(name, found, live))
        layouts[name] = learn(folder / name, live) if found is None else found
    unknown = seen.of_optimizer - {_OPTIMIZER, _SCHEDULER}
    if unknown:
        raise NotLearned(f"{', '.join(sorted(unknown))}: unknown file")
    if _OPTIMIZER in seen.of_optimizer:
        state = plain_copy(trainer.optimizer.state_dict())  # what later saves are made of
        archive = TorchArchive(state, "optimizer").at(folder / _OPTIMIZER)
        later = None if at_once else comparison_of_archive(_OPTIMIZER, archive, tensors_in(state, "optimizer"))
        if later is None:
            require_archive(folder / _OPTIMIZER, state)
        else:
            comparisons.append(later)
    if _SCHEDULER in seen.of_optimizer:
        require_archive(folder / _SCHEDULER, trainer.lr_scheduler.state_dict())
    template = Template(
        folder=folder,
        static=static,
        owned=seen.owned,
        layouts=layouts,
        has_optimizer=_OPTIMIZER in seen.of_optimizer,
        has_scheduler=_SCHEDULER in seen.of_optimizer,
        has_arguments=ARGUMENTS in seen.of_model,
        rng_file=learned_rng_file(trainer, folder),
        ingredients=ingredients(trainer, live),
    )
    return template, comparisons


def files_of_model(seen: Observed) -> tuple[dict[str, bytes], list[str]]:
    """What stays the same of the files of the model, by path, and the paths of those with weights.

    Raises:
        NotLearned: One may be neither, or none has weights.
        OSError: One cannot be read.
    """
    assert seen.checkpoint is not None
    static: dict[str, bytes] = {}
    weights = []
    for name in sorted(seen.of_model - {ARGUMENTS}):
        path = seen.checkpoint / name
        if path.suffix == ".safetensors":
            weights.append(name)
        elif path.suffix in _WEIGHTS:
            raise NotLearned(f"{name}: unknown file")
        elif sum(map(len, static.values())) + path.stat().st_size > _MOST_STATIC:
            raise NotLearned(f"{name}: more than {_MOST_STATIC >> 20} MiB beside the weights")
        else:
            static[name] = path.read_bytes()
    if not weights:
        raise NotLearned("Trainer's save wrote no safetensors file")
    return {name: content for name, content in static.items() if name not in seen.owned.files}, weights


def ingredients(trainer: Any, live: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """What static files are made of, as far as it can be told cheaply; and names and kinds of the ``live`` tensors."""
    model = unwrapped(trainer.model)
    first: dict[int, str] = {}  # names that share a tensor are tied
    tensors = [
        (name, tensor.shape, tensor.dtype, tensor.requires_grad, first.setdefault(id(tensor), name))
        for name, tensor in live.items()
    ]
    configs: list[Any] = [getattr(model, "config", None), getattr(model, "generation_config", None)]
    parts: list[Any] = [config.to_dict() if hasattr(config, "to_dict") else None for config in configs]
    parts += [config.to_dict() for _, config in sorted(getattr(model, "peft_config", {}).items())]
    tokenizer = tokenizer_of(trainer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts += [len(tokenizer) if hasattr(tokenizer, "__len__") else None]
    parts += [getattr(backend, name, None) for name in _OF_A_TOKENIZER]
    parts += [_plain_state(tokenizer, 4)]
    return tensors, json.dumps(parts, default=repr, sort_keys=False, skipkeys=True)


def _plain_state(value: Any, depth: int) -> Any:
    """What an object holds, as far as it is plain: its attributes, and theirs. Of large containers the size alone."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (Mapping, list, tuple, set, frozenset)) and len(value) > _MOST_ITEMS:
        return [type(value).__name__, len(value)]
    if depth == 0 or isinstance(value, (torch.Tensor, torch.nn.Module)):
        return type(value).__name__
    if isinstance(value, Mapping):
        return {str(key): _plain_state(one, depth - 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_state(one, depth - 1) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return {"": type(value).__qualname__, "of": _plain_state(attributes_of(value), depth - 1)}
