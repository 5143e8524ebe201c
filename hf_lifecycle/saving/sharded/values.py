"""What ``torch.distributed.checkpoint`` (DCP) saves of a model and its optimizer, found without asking it each time.

Promise: :meth:`SavedNames.present` gives every value that DCP's ``get_model_state_dict`` and
``get_optimizer_state_dict`` would give, under the name that DCP's planner gives it, where the model and the optimizer
are what they were when the names were learned. It makes no exchange with other ranks.

DCP is imported where it is used: a training whose model is not sharded has no use for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.sharded.seen import Seen
from hf_lifecycle.saving.snapshots.live import live_tensors
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.state.fingerprint import is_shared_out, local_part
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.torch_internals import storage_id

__all__ = ["Live", "Parts", "Present", "SavedNames", "Training", "learn_names"]

Live = Mapping[str, torch.Tensor]
T = TypeVar("T")

_NO_STATE: dict[str, Any] = {"state": {}, "param_groups": []}


class Training(NamedTuple):
    """A model and its optimizer, as a host saves them.

    Attributes:
        model: The model, in the wrappers that the host gives to DCP.
        optimizer: The optimizer likewise; None where there is none.
        model_folder: The folder of the model, or its file, by its path in the checkpoint.
        optimizer_folder: The same of the optimizer.
        prefix: What the names of the model's tensors begin with, such as ``model 0.``.
        name: What the optimizer's values are named after.
    """

    model: Any
    optimizer: Any
    model_folder: str
    optimizer_folder: str
    prefix: str = ""
    name: str = "optimizer"


class Present(NamedTuple):
    """What there is of one :class:`Training` at a save.

    Attributes:
        live: The model's parameters and buffers by each of their names, DTensors as they are.
        optimizer: The optimizer's state, of DTensors this rank's parts.
        tensors: This rank's part of everything, for a snapshot.
        folders: By folder what DCP saves there, by its name, as DCP would be given it.
        settings: Of an optimizer that has no state, which DCP lets make one by a step of its own before it saves.
    """

    live: Live
    optimizer: Any
    tensors: list[LiveTensor]
    folders: Mapping[str, Mapping[str, Any]]
    settings: Any = ()


class Parts:
    """This rank's part of tensors, as plain tensors that are the same objects from save to save.

    To ask a DTensor for its part and for what it is like takes some microseconds, of some hundreds of them.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[torch.Tensor, Any]] = {}  # by the identity of the whole: its part and its kind
        self._before: dict[int, tuple[torch.Tensor, Any]] = {}
        # By name what was made of tensors, and what is known of these.
        self._kept: dict[str, tuple[Seen, Any, Any, dict[int, tuple[torch.Tensor, Any]]]] = {}

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Around a look at all tensors: those that are not asked for any more are kept no longer."""
        self._before, self._known = self._known, {}
        try:
            with torch.no_grad():
                yield
        finally:
            self._before = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part. Of a tensor that is not sharded, itself."""
        return found[0] if (found := self._known.get(id(tensor))) is not None else self._look(tensor)[0]

    def kind_of(self, value: Any) -> Any:
        """What decides which rank writes a value: shapes and placement; None of one that is no tensor."""
        if (found := self._known.get(id(value))) is not None:
            return found[1]
        return self._look(value)[1] if isinstance(value, torch.Tensor) else None

    # Invariant: whoever asks has the tensor, so that no other object has its identity while it is known.
    def _look(self, whole: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if not is_shared_out(whole):
            self._known[id(whole)] = whole, _kind_of(whole)
            return self._known[id(whole)]
        part = local_part(whole)
        found = self._before.get(id(whole))
        if found is None or not part.is_set_to(found[0]) or part.dtype != found[0].dtype:
            found = part.detach(), _kind_of(whole)
        self._known[id(whole)] = found
        return found

    def kept(self, name: str, named: Sequence[Mapping[Any, Any]], of: Any, make: Callable[[], T]) -> T:
        """What ``make`` gives: what it gave before, for as long as these are the very same tensors, where they were.

        Args:
            named: All tensors that it is made of, by their names.
            of: What else it is made of.
        """
        if not all(isinstance(tensor, torch.Tensor) for one in named for tensor in one.values()):
            return make()
        seen = Seen(named)
        if (before := self._kept.get(name)) is not None and seen.is_as(before[0]) and of == before[1]:
            self._known |= before[3]
            made: T = before[2]
            return made
        made = make()
        self._kept[name] = seen.kept(), of, made, {id(one): self._known[id(one)] for one in seen.tensors}
        return made

    def clear(self) -> None:
        """Keep none any more."""
        self._known.clear()
        self._kept.clear()


def _kind_of(tensor: Any) -> Any:
    placed = (tensor.device_mesh, tensor.placements) if is_shared_out(tensor) else ()
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type, placed


class SavedNames(NamedTuple):
    """What DCP calls the values of one training.

    Attributes:
        model: The live name of each entry of the model's state, by its own.
        parameters: The name of each of the optimizer's parameters, in the order of its groups.
    """

    model: Mapping[str, str]
    parameters: tuple[str, ...]

    def present(self, training: Training, parts: Parts) -> Present:
        """What there is now.

        Raises:
            NotLearned: The optimizer has other parameters than it had.
            KeyError: The model lacks a tensor that it had.
            TypeError: The optimizer's state holds what is neither a tensor nor plain.
        """
        live = live_of(training.model)
        state = _NO_STATE if training.optimizer is None else training.optimizer.state_dict()
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        if len(numbers) != len(self.parameters):
            raise NotLearned(f"{training.name} has other parameters than at the save before")
        rows, rest = state["state"], {key: value for key, value in state.items() if key != "state"}
        by_name = self.named(state)

        def make() -> tuple[Any, list[LiveTensor], Mapping[str, Any], Mapping[str, Any]]:
            of_model = [_live_tensor(training.prefix + name, tensor, parts) for name, tensor in live.items()]
            local, tensors = _local({"state": rows}, training.name, parts)
            saved = {f"model.{fqn}": live[name] for fqn, name in self.model.items()}
            return local, [*of_model, *tensors], saved, _flattened({"optimizer": {"state": by_name["state"]}})

        plain = all(type(row) is dict for row in rows.values())
        of = self, list(rows)
        local, tensors, saved, flat = parts.kept(training.name, [live, *rows.values()], of, make) if plain else make()
        folders = {training.model_folder: saved}
        if training.optimizer is None:
            return Present(live, {}, tensors, folders)
        others, more = _local(rest, training.name, parts)
        groups = {key: value for key, value in by_name.items() if key != "state"}
        folders[training.optimizer_folder] = {**flat, **_flattened({"optimizer": groups})}
        settings = [] if rows else [sorted(_lasting(group)) for group in by_name["param_groups"]]
        return Present(live, {**local, **others}, [*tensors, *more], folders, settings)

    def named(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state of the optimizer, with DCP's names instead of the numbers of parameters."""
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        names = dict(zip(numbers, self.parameters, strict=True))
        groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
        return {"state": {names[key]: row for key, row in state["state"].items()}, "param_groups": groups}


def live_of(model: Any) -> Live:
    """Every parameter and buffer of a model by each of its names; each parameter sharded, if it ever is."""
    inner = unwrapped(model)
    inner.state_dict(keep_vars=True)  # a hook of FSDP's lets go of what an evaluation has left gathered
    return live_tensors(inner)


def learn_names(training: Training) -> SavedNames:
    """Ask DCP for its names.

    Raises:
        NotLearned: A value of the model is no live tensor of it, or a value of the optimizer cannot be found again.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    live = live_of(training.model)
    places: dict[Any, str] = {}
    for name, tensor in live.items():
        places.setdefault(_place(tensor), name)
    found: dict[str, str] = {}
    for fqn, value in get_model_state_dict(training.model).items():
        own = places.get(_place(value)) if isinstance(value, torch.Tensor) else None
        if own is None:
            raise NotLearned(f"{training.model_folder}: {fqn} is not a tensor of the model")
        found[fqn] = own
    if training.optimizer is None:
        return SavedNames(found, ())
    state = get_optimizer_state_dict(training.model, training.optimizer)
    groups: Any = state["param_groups"]
    own_groups = training.optimizer.state_dict()["param_groups"]
    if [len(one["params"]) for one in groups] != [len(one["params"]) for one in own_groups]:
        raise NotLearned(f"{training.optimizer_folder}: its groups differ from those of the optimizer")
    return SavedNames(found, tuple(fqn for group in groups for fqn in group["params"]))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    with torch.no_grad():
        part = local_part(tensor)
    return storage_id(part), part.storage_offset(), part.shape, part.stride(), part.dtype


def _live_tensor(name: str, tensor: torch.Tensor, parts: Parts) -> LiveTensor:
    only_steps_write = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
    part = parts.of(tensor)
    return LiveTensor(name, part, not only_steps_write, whole=None if part is tensor else tensor)


def _local(state: Any, name: str, parts: Parts) -> tuple[Any, list[LiveTensor]]:
    """The state with this rank's parts instead of DTensors, and containers of its own; and its tensors by path."""
    found: list[LiveTensor] = []

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            part = parts.of(value)
            if type(part) not in (torch.Tensor, torch.nn.Parameter) or part.layout is not torch.strided:
                raise TypeError(f"{type(part).__name__} ({path})")
            found.append(LiveTensor(path, part, at_once=False, whole=None if part is value else value))
            return part
        if isinstance(value, Mapping):
            return {key: walk(one, f"{path}.{key}") for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(walk(one, f"{path}.{number}") for number, one in enumerate(value))
        return value

    return walk(state, name), found


def _lasting(group: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a schedule does not change."""
    yield from ((key, repr(value)) for key, value in group.items() if key not in ("lr", "initial_lr", "params"))


def _flattened(tree: dict[str, Any]) -> Mapping[str, Any]:
    """The values of a nested state by the names that DCP's planner gives them."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_sharded_tensors=False)  # of these there are none; to look takes as long
    planner.set_up_planner(tree, is_coordinator=False)
    return planner.state_dict
