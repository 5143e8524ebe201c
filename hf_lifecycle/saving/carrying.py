"""How something that is trained outside the model is stored: its state as a plain tree, given back and proved."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hf_lifecycle.checkpoint.files.tree import encode
from hf_lifecycle.errors import UnsafeStateError
from hf_lifecycle.saving.snapshots.live import host_copy, settled_copy
from hf_lifecycle.state.fingerprint import is_shared_out, leaf_digests, module_tensors, sample_digests
from hf_lifecycle.state.gathering import is_dense
from hf_lifecycle.state.proof import differing, put_back_optimizer_values, with_tensors
from hf_lifecycle.torch_internals import version_counter

__all__ = [
    "in_place_of",
    "is_large",
    "leaves_of",
    "load_state",
    "mark_of_module",
    "obstacle",
    "plain",
    "sample_of",
    "state_of",
    "without_tensors",
]

_LARGE = 8 << 20  # bytes of a module that is stored only once it has changed


def is_large(one: Any) -> bool:
    """Whether a module is too large to be stored where it does not change."""
    if not isinstance(one, torch.nn.Module):
        return False
    return sum(each.numel() * each.element_size() for each in module_tensors(one).values()) > _LARGE


def mark_of_module(module: torch.nn.Module) -> tuple[str, tuple[int, ...]]:
    """What tells whether a module was changed: a sample of each tensor, and how often each was written to."""
    tensors = list(module_tensors(module).values())
    return sample_of(tensors), tuple(version_counter(tensor) for tensor in tensors)


def sample_of(tensors: Iterable[torch.Tensor]) -> str:
    """One digest of a few elements of each."""
    return "".join(sample_digests({str(number): one for number, one in enumerate(tensors)}).values())


def obstacle(one: Any) -> str | None:
    """Why the state of something cannot be stored."""
    if isinstance(one, torch.nn.Module) and any(is_shared_out(each) for each in module_tensors(one).values()):
        return "it is sharded over the ranks"
    try:
        encode({"state": without_tensors(_in_plain_dicts(dict(one.state_dict())))})
    except (UnsafeStateError, ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        return str(error)
    return None


def without_tensors(tree: Any) -> Any:
    """The tree with a None for each dense tensor: what decides whether it can be stored, without its bytes."""
    return with_tensors(tree, lambda one: None if is_dense(one) else one)


def _in_plain_dicts(tree: Any) -> Any:
    """The tree with dicts in the place of those of other classes, as torch's ``MultiStepLR`` has a ``Counter``."""
    if isinstance(tree, dict) and type(tree) is not OrderedDict:
        return {key: _in_plain_dicts(value) for key, value in tree.items()}
    return type(tree)(map(_in_plain_dicts, tree)) if type(tree) in (list, tuple) else tree


def _in_dicts_of(own: Any, saved: Any) -> Any:
    """What :func:`_in_plain_dicts` gave, in dicts of the classes that those of ``own`` have in the same places."""
    if type(saved) is dict and isinstance(own, dict):
        values = {key: _in_dicts_of(own.get(key), value) for key, value in saved.items()}
        if type(own) is dict:
            return values
        made = copy.copy(own)
        dict.clear(made)
        dict.update(made, values)
        return made
    if type(saved) in (list, tuple) and type(own) is type(saved) and len(own) == len(saved):
        return type(saved)(map(_in_dicts_of, own, saved))
    return saved


def state_of(one: Any) -> dict[str, Any]:
    """A copy of the state of a module, an optimizer or a scheduler."""
    state = settled_copy(_in_plain_dicts(dict(one.state_dict())))
    if not isinstance(one, torch.nn.Module):
        return {"state": state}
    return {"state": state, "unsaved": {n: host_copy(each) for n, each in one.named_buffers() if n not in state}}


def load_state(name: str, one: Any, saved: Mapping[str, Any]) -> list[str]:
    """Give ``one`` its state back. Returns what is not what was saved then."""
    groups = list(getattr(one, "param_groups", ())) if isinstance(one, torch.optim.Optimizer) else []
    try:
        one.load_state_dict(_in_dicts_of(one.state_dict(), saved["state"]))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        return [f"{name}: the saved state does not fit: {str(error).splitlines()[0]}"]
    if groups:
        _keep_groups(one, groups)
    if isinstance(one, torch.nn.Module):
        with torch.no_grad():
            for key, buffer in one.named_buffers():
                if key in saved["unsaved"] and saved["unsaved"][key].shape == buffer.shape:
                    buffer.copy_(saved["unsaved"][key])
    wanted = leaf_digests(saved, "optimizer")
    lost = differing(wanted, leaf_digests(state_of(one), "optimizer"))
    if lost and isinstance(one, torch.optim.Optimizer):  # its state was cast to the dtype of its parameters
        names = [f"optimizer{key.removeprefix('optimizer.state')}" for key in lost]
        put_back_optimizer_values(one, saved["state"], names)
        lost = differing(wanted, leaf_digests(state_of(one), "optimizer"))
    return [f"{name}: {len(lost)} of its values differ from what was saved after loading"] if lost else []


def _keep_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Let the groups that were loaded be those objects that were there: an optimizer that wraps this one has them."""
    loaded = optimizer.param_groups
    for own, new in zip(groups, loaded, strict=True):
        if own is not new:
            own.clear()
            own.update(new)
    loaded[:] = groups


def leaves_of(tree: Any) -> list[Any]:
    """What is in a tree of dicts, lists and tuples."""
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in leaves_of(value)]
    return [leaf for value in tree for leaf in leaves_of(value)] if isinstance(tree, (list, tuple)) else [tree]


def plain(value: Any) -> Any:
    """The same in dicts and lists, which can be stored."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [plain(one) for one in value]
    return value


def in_place_of(own: Any, saved: Any, device: torch.device) -> Any:
    """``saved`` in the containers of ``own``, on the device of the training."""
    if isinstance(saved, torch.Tensor):
        return saved.to(device)
    if isinstance(saved, dict):
        kept = own if isinstance(own, dict) else {}
        kept.update({key: in_place_of(_child(kept, key), value, device) for key, value in saved.items()})
        return kept
    if isinstance(saved, list):
        values = [in_place_of(None, value, device) for value in saved]
        return deque(values, own.maxlen) if isinstance(own, deque) else values
    return saved


def _child(kept: dict[Any, Any], key: Any) -> Any:
    if key not in kept and isinstance(kept, defaultdict) and kept.default_factory is not None:
        return kept.default_factory()
    return kept.get(key)
