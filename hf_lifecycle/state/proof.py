"""Whether what was loaded is what was saved: the live state of a training held against the digests of its save.

Here are the pieces that every host shares: which digests are taken, and what an optimizer's ``load_state_dict`` loses.
Who saves and loads, and when, is the host's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_lifecycle.state.fingerprint import leaf_digests

__all__ = [
    "Proof",
    "beside_digests",
    "describe_differing",
    "differing",
    "put_back_optimizer_values",
    "unwrapped",
]


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
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def beside_digests(optimizer: Any, scheduler: Any, scaler: Any) -> dict[str, dict[str, str]]:
    """The digests of what is trained with beside the model; of a None, no digests."""
    live = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    return {kind: {} if one is None else leaf_digests(one.state_dict(), kind) for kind, one in live.items()}


def put_back_optimizer_values(optimizer: Any, saved: Mapping[str, Any], names: Sequence[str]) -> None:
    """Put the state values ``names`` (``optimizer.state.<index>.<key>``) back with the dtype they were saved in.

    An optimizer's ``load_state_dict`` casts its state to the parameters' dtype; ``saved``, its ``state_dict()``, has it
    as it was.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for name in names:
        _, kind, *path = name.split(".", 3)
        if kind != "state" or len(path) != 2:
            continue
        index, key = int(path[0]), path[1]
        value = saved["state"].get(index, {}).get(key)
        if isinstance(value, torch.Tensor) and index < len(parameters):
            parameter = parameters[index]
            live = inner.state[parameter].get(key)
            device = live.device if isinstance(live, torch.Tensor) else parameter.device
            inner.state[parameter][key] = value.to(device)


def differing(saved: Mapping[str, str], live: Mapping[str, str]) -> list[str]:
    """The names in ``saved`` whose digest is another, or none, in ``live``."""
    return [name for name in saved if saved[name] != live.get(name)]


def describe_differing(kind: str, names: Sequence[str]) -> list[str]:
    """A sentence for each name."""
    return [f"{kind}: {name} is not what was saved" for name in names]
