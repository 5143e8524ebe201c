"""Whether what was loaded is what was saved: the live state of a training held against the digests of its save.

Here are its pieces: what differs and how that is said, and what an optimizer's ``load_state_dict`` loses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hf_lifecycle.state.fingerprint import tensor_digest
from hf_lifecycle.torch_internals import compiled_from

__all__ = [
    "Proof",
    "by_address",
    "describe_differing",
    "differing",
    "parameters_in",
    "put_back_keys",
    "put_back_optimizer_values",
    "unwrapped",
    "with_tensors",
]

_EXAMPLES = 3  # of many names, in a message


class Proof(dict[str, int]):
    """How many tensors and values of each kind were proved, and how many repaired.

    Attributes:
        names: Of what was repaired.
    """

    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.items() if count)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside ``torch.compile`` and data parallel wrappers."""
    while True:
        inner = compiled_from(model)
        if inner is None and isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def put_back_optimizer_values(optimizer: Any, saved: Mapping[str, Any], names: Sequence[str]) -> None:
    """Put the state values ``names`` (``optimizer.state.<index>.<key>``) back with the dtype they were saved in.

    An optimizer's ``load_state_dict`` casts its state to the parameters' dtype; ``saved``, its ``state_dict()``, has it
    as it was.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = list(parameters_in([inner]))
    lost = {tuple(path[2:4]) for path in (name.split(".") for name in names) if path[1] == "state"}
    for index, parameter in enumerate(parameters):
        for key, value in saved.get("state", {}).get(index, {}).items():
            if (str(index), str(key).partition(".")[0]) in lost and parameter in inner.state:
                live = inner.state[parameter].get(key)
                device = live.device if isinstance(live, torch.Tensor) else parameter.device
                inner.state[parameter][key] = with_tensors(value, functools.partial(torch.Tensor.to, device=device))


def _groups_of(optimizer: Any) -> Sequence[dict[str, Any]]:
    return getattr(getattr(optimizer, "optimizer", optimizer), "param_groups", ())


def by_address(optimizer: Any) -> list[str]:
    """What groups keep by the ``id()`` or the address of their parameters, which are others in the next process."""
    return [
        f"param_groups[{number}][{name!r}]"
        for number, group in enumerate(_groups_of(optimizer))
        for name, kept in group.items()
        if type(kept) is dict
        and any(type(key) is int for key in kept)
        and not kept.keys().isdisjoint({each for one in group["params"] for each in (id(one), one.data_ptr())})
    ]


def put_back_keys(optimizer: Any) -> list[str]:
    """Where a group keeps something by parameter, keep it by those that are trained: a file has copies of them.

    A copy is known by its bytes, those of the weights that were loaded. Returns a sentence for each group with others.
    """
    problems = []
    for number, group in enumerate(_groups_of(optimizer)):
        for name, kept in group.items():
            own = {id(one) for one in group["params"]}
            keys = [one for one in kept if isinstance(one, torch.Tensor)] if type(kept) is dict else []
            copies = [one for one in keys if id(one) not in own]
            alike: dict[str, list[torch.Tensor]] = {}
            for one in group["params"] if copies else ():
                if one not in kept:
                    alike.setdefault(tensor_digest(one), []).append(one)
            lost = 0
            for one in copies:
                if trained := alike.get(tensor_digest(one)):
                    kept[trained.pop(0)] = kept.pop(one)
                else:
                    lost += 1
            if lost:
                problems.append(
                    f"optimizer: param_groups[{number}][{name!r}] is kept by parameter, and {lost} of these are none "
                    "of those that are trained"
                )
    return problems


def with_tensors(tree: Any, make: Callable[[torch.Tensor], Any]) -> Any:
    """The same tree, of whatever depth, with what ``make`` makes of each of its tensors in their place."""
    if isinstance(tree, torch.Tensor):
        return make(tree)
    if isinstance(tree, dict):
        return {key: with_tensors(value, make) for key, value in tree.items()}
    return type(tree)(with_tensors(value, make) for value in tree) if type(tree) in (list, tuple) else tree


def parameters_in(optimizers: Iterable[Any]) -> Iterator[Any]:
    """What the groups of these optimizers hold, one after the other."""
    yield from (each for one in optimizers for group in getattr(one, "param_groups", ()) for each in group["params"])


def differing(saved: Mapping[str, str], live: Mapping[str, str]) -> list[str]:
    """The names in ``saved`` whose digest is another, or none, in ``live``."""
    return [name for name in saved if saved[name] != live.get(name)]


def describe_differing(kind: str, names: Sequence[str]) -> list[str]:
    """A sentence for each name; of many, for three, and how many more there are."""
    told = [f"{kind}: {name} differs from what was saved" for name in names[:_EXAMPLES]]
    return told + ([f"{kind}: {len(names) - _EXAMPLES} more differ"] if len(names) > _EXAMPLES else [])
