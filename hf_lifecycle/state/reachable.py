"""Which modules, optimizers and schedulers can be reached from some objects: attributes, containers, closures, hooks.

Promise: the names are paths of attributes, the same in every process that builds the same objects in the same order.
Not promised: what is held in C, by a generator, or by an object of a library that is listed here, is found.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch

from hf_lifecycle.state.functions import variables_of
from hf_lifecycle.state.modules import modules_of, parameters_of
from hf_lifecycle.state.proof import unwrapped

__all__ = [
    "attributes_of",
    "hooks_of",
    "hooks_of_optimizer",
    "is_of_library",
    "is_stateful",
    "kept_by",
    "kept_by_optimizer",
    "reachable",
]

_DEEPEST = 8
_MOST = 20_000  # objects that are looked at
_MOST_ITEMS = 512  # of one container
# Of these, the objects are not entered: they are not a user's, or hold no more than what is found elsewhere.
_LIBRARIES = frozenset(
    {
        "PIL",
        "_thread",
        "accelerate",
        "asyncio",
        "builtins",
        "concurrent",
        "datasets",
        "deepspeed",
        "hf_lifecycle",
        "huggingface_hub",
        "io",
        "logging",
        "matplotlib",
        "multiprocessing",
        "numpy",
        "pandas",
        "pathlib",
        "re",
        "safetensors",
        "threading",
        "tokenizers",
        "torch",
        "torchdata",
        "transformers",
        "vllm",
        "wandb",
    }
)
_MODULE_OWN = frozenset(vars(torch.nn.Module()))
_MODULE_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")
_CARRIED = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


def reachable(roots: Mapping[str, Any], known: Iterable[Any] = ()) -> dict[str, Any]:
    """The modules, optimizers and schedulers within ``roots``, each once, by its path.

    Args:
        roots: Where to begin, by name.
        known: Objects that are not reported and not entered. A module that has tensors of a known module is entered in
            the place of being reported.
    """
    known = list(known)
    seen = {id(one) for one in known}
    own = {id(one) for module in known if isinstance(module, torch.nn.Module) for one in _within(module)}
    found: dict[str, Any] = {}
    alive: list[Any] = []  # what is made on the way, such as bound methods, so that no identity is used twice
    queue = deque((name, value, 0) for name, value in roots.items())
    while queue and len(alive) < _MOST:
        name, value, depth = queue.popleft()
        if isinstance(value, torch.nn.Module):
            value = unwrapped(value)
        if id(value) in seen or id(value) in own:
            continue
        seen.add(id(value))
        alive.append(value)
        if isinstance(value, torch.nn.Module) and any(id(one) in own for one in _within(value)):
            queue.extend((f"{name}.{key}", child, depth) for key, child in value._modules.items())
        elif isinstance(value, _CARRIED) or is_stateful(value):
            found[name] = value
            seen.update(id(one) for one in (_within(value) if isinstance(value, torch.nn.Module) else ()))
        elif depth < _DEEPEST:
            queue.extend((f"{name}{key}", child, depth + 1) for key, child in _children(value))
    return found


def hooks_of(model: torch.nn.Module, called: str) -> dict[str, list[Any]]:
    """A user's hooks on the parameters and modules of a model, in which an optimizer may step.

    Args:
        model: The model.
        called: What the names begin with.
    """
    hooks: dict[str, list[Any]] = {
        f"hooks of {called}.{name}": _without_ours(own)
        for name, one in parameters_of(model).items()
        for own in (getattr(one, "_post_accumulate_grad_hooks", None), one._backward_hooks)
        if own
    }
    for name, module in modules_of(model):
        held = vars(module)
        for key in _MODULE_HOOKS:
            if held.get(key):
                hooks[f"{key} of {called}.{name}" if name else f"{key} of {called}"] = _without_ours(held[key])
    return hooks


def kept_by(model: torch.nn.Module, called: str) -> dict[str, Any]:
    """What a model keeps beside its modules: hooks, and attributes of a user's modules; ``called`` as before."""
    kept: dict[str, Any] = dict(hooks_of(model, called))
    for name, module in modules_of(model):
        if not is_of_library(type(module)):
            within = f"{called}.{name}" if name else called
            kept |= {f"{within}.{key}": one for key, one in vars(module).items() if key not in _MODULE_OWN}
    return kept


def hooks_of_optimizer(optimizer: Any, called: str) -> dict[str, list[Any]]:
    """A user's hooks on an optimizer; ``called``: what the names begin with."""
    held = attributes_of(optimizer).items()
    return {f"{called}.{key}": _without_ours(one) for key, one in held if key.endswith("_hooks") and one}


def kept_by_optimizer(optimizer: Any, called: str) -> dict[str, Any]:
    """What an optimizer keeps beside its state: hooks, and attributes such as an optimizer that it wraps."""
    held = attributes_of(optimizer).items()
    own = {f"{called}.{key}": one for key, one in held if key not in ("state", "param_groups", "defaults")}
    return own | hooks_of_optimizer(optimizer, called)


def _without_ours(hooks: Mapping[int, Any]) -> list[Any]:
    """Those that a user registered; torch numbers them by all that there ever were in the process."""
    return [one for one in hooks.values() if _root(getattr(one, "__module__", None)) != "hf_lifecycle"]


def _within(module: torch.nn.Module) -> Iterator[Any]:
    yield from module.modules()
    yield from module.parameters()


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (str, bytes, int, float, torch.Tensor, type)) or value is None:
        return
    if isinstance(value, Mapping):
        for number, (key, one) in enumerate(list(value.items())[:_MOST_ITEMS]):
            yield f".{key}" if isinstance(key, (str, int)) else f"[{number}]", one
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{number}]", one) for number, one in enumerate(value[:_MOST_ITEMS]))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield from (("", value.__func__), (".self", value.__self__))
    elif isinstance(value, FunctionType):
        if _root(value.__module__) not in _LIBRARIES - {"transformers"}:
            yield from ((f".{one.name}", one.value) for one in variables_of(value))
    elif _root(type(value).__module__) not in _LIBRARIES:
        yield from ((f".{key}", one) for key, one in list(attributes_of(value).items()))


def attributes_of(one: Any) -> Any:
    """What an object or a class holds under which name, whatever its class makes of a request for it."""
    try:
        return object.__getattribute__(one, "__dict__")
    except AttributeError:
        return {}


def is_of_library(one: Any) -> bool:
    """Whether a class or a function is of a library whose objects are not a user's."""
    return _root(one.__module__) in _LIBRARIES


def is_stateful(one: Any) -> bool:
    """Whether it is an object of a user's class that gives its state and takes it, such as an average of weights."""
    kind = type(one)
    if isinstance(one, (type, torch.nn.Module)) or is_of_library(kind):
        return False
    return all(callable(getattr(kind, name, None)) for name in ("state_dict", "load_state_dict"))


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]
