"""Which live tensors a save consists of, and what of a state may not change while it is written.

No host is known here: models are modules, optimizers are trees of their state.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.state.gathering import gathered
from hf_lifecycle.state.modules import modules_of
from hf_lifecycle.torch_internals import COMPUTES_STATE, STATE_HOOKS, buffers_of, children_of, own_parameters

__all__ = [
    "computed_state",
    "host_copy",
    "live_tensors",
    "model_tensors",
    "settled_copy",
    "stepping",
    "strange_tensors",
    "tensors_in",
    "tensors_of",
]


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by each of its names, as ``named_parameters`` and ``named_buffers`` have them.

    In one walk instead of two that yield through every level: a save is stopped for it.
    """
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    _walk(model, "", parameters, buffers)
    return parameters | buffers


def _walk(
    module: torch.nn.Module, prefix: str, parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]
) -> None:
    for own, found in ((own_parameters(module), parameters), (buffers_of(module), buffers)):
        for key, tensor in own.items():
            if tensor is not None:
                found[prefix + key] = tensor
    for key, child in children_of(module).items():
        if child is not None:
            _walk(child, f"{prefix}{key}.", parameters, buffers)


def model_tensors(live: Mapping[str, torch.Tensor], in_files: Collection[str], prefix: str = "") -> list[LiveTensor]:
    """Of a model, what training changes and what its files are made of.

    Args:
        in_files: The names of those that its files are made of.
        prefix: What a message, and whoever asks for a copy, puts before a tensor's name.
    """
    found = []
    for name, tensor in live.items():
        is_parameter = type(tensor) is torch.nn.Parameter or isinstance(tensor, torch.nn.Parameter)  # slow to ask
        is_trained = tensor.requires_grad
        if is_trained or not is_parameter or name in in_files:
            found.append(LiveTensor(prefix + name, tensor, not (is_parameter and is_trained)))
    return found


def tensors_in(tree: Any, name: str) -> list[LiveTensor]:
    """The tensors of an optimizer's state, under the paths that their digests have.

    Args:
        tree: Its :func:`~hf_lifecycle.saving.files.archive.plain_copy`.
        name: What the paths begin with.

    Raises:
        TypeError: One is not plain.
    """
    found: list[LiveTensor] = []
    _collect(tree, name, found)
    return found


def _collect(tree: Any, name: str, found: list[LiveTensor]) -> None:
    if type(tree) is torch.Tensor and tree.layout is torch.strided:
        found.append(LiveTensor(name, tree, False, not tree.requires_grad))  # those are the copy's own
    elif isinstance(tree, torch.Tensor):
        raise TypeError(f"{type(tree).__name__} ({name})")
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if type(value) not in _HOLDS_NONE:
                _collect(value, f"{name}.{key}", found)
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            if type(value) not in _HOLDS_NONE:
                _collect(value, f"{name}.{number}", found)


_HOLDS_NONE = frozenset({int, float, bool, str, type(None)})


def strange_tensors(models: Iterable[torch.nn.Module]) -> str | None:
    """Why tensors of these models cannot be copied as plain memory of one device; None if they can."""
    tensors = [tensor for model in models for tensor in live_tensors(model).values()]
    strange = [tensor for tensor in tensors if type(tensor) not in (torch.Tensor, torch.nn.Parameter)]
    if strange or any(one.layout is not torch.strided or one.is_quantized or one.is_conj() for one in tensors):
        return (
            "the model has tensors of a kind that is not supported "
            f"({(type(strange[0]).__name__ if strange else 'sparse')})"
        )
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
        return f"the model is on {', '.join(sorted(map(str, devices)))}"
    return None


def computed_state(models: Iterable[torch.nn.Module], admitted: str = "") -> str | None:
    """Why files of these models may hold something else than their tensors: code of somebody's makes their state.

    Args:
        admitted: The package whose hooks make nothing else of it; empty for none.
    """
    of_kinds: dict[type, list[str]] = {}
    plain = torch.nn.Module
    place = plain.register_buffer.__code__.co_filename
    for one in COMPUTES_STATE:  # replaced on torch's own class, it is every module's
        code = getattr(getattr(plain, one, None), "__code__", None)
        if hasattr(plain, one) and (code is None or code.co_filename != place):
            return f"torch.nn.Module.{one} was replaced"
    for model in models:
        for name, module in modules_of(model):
            kind, held = type(module), vars(module)
            if kind not in of_kinds:
                of_kinds[kind] = [
                    one for one in COMPUTES_STATE if getattr(kind, one, None) is not getattr(plain, one, None)
                ]
            own = of_kinds[kind] or [one for one in COMPUTES_STATE if one in held]
            hooked = held.get(STATE_HOOKS[0]) or held.get(STATE_HOOKS[1])
            if own or (hooked and not (admitted and _all_of(admitted, held))):
                what = f"overrides {own[0]}" if own else "has a hook on its state_dict"
                return f"{kind.__name__}{f' ({name})' if name else ''} {what}"
    return None


def _all_of(package: str, held: Mapping[str, Any]) -> bool:
    hooks = [hook for kind in STATE_HOOKS for hook in (held.get(kind) or {}).values()]
    return all(str(getattr(hook, "__module__", "")).startswith(package) for hook in hooks)


def stepping(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer inside wrappers whose step is the last; None where there is none."""
    while optimizer is not None:
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        optimizer = inner
    return None


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory. It is made here and now: the thread that writes must ask nothing of a device."""
    return tensor.detach().to("cpu", copy=True)


def settled_copy(tree: Any, known: Mapping[int, torch.Tensor] | None = None) -> Any:
    """A user's state with tensors, in host memory, and containers of its own.

    Args:
        known: Copies of some of its tensors that there are already, by the tensors' ``id()``.
    """
    copies = dict(known or {})
    near = gathered({id(one): one for one in tensors_of(tree) if id(one) not in copies})
    return _settled(tree, copies | {number: piece.clone() for number, piece in near.items()})


def _settled(tree: Any, copies: Mapping[int, torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return copies[id(tree)] if id(tree) in copies else host_copy(tree)
    if type(tree) is dict:
        return {key: _settled(value, copies) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_settled(value, copies) for value in tree)
    return copy.deepcopy(tree)


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif type(tree) in (dict, list, tuple):
        for value in tree.values() if type(tree) is dict else tree:
            yield from tensors_of(value)
