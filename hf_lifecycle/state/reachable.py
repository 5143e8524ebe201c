"""Which modules, optimizers and schedulers can be reached from some objects: attributes, containers, closures, hooks.

Promise: the names are paths of attributes, the same in every process that builds the same objects in the same order.
Not promised: what is held in C, by a generator, or by an object of a library that is listed here, is found.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from types import FunctionType, MemberDescriptorType, MethodType
from typing import Any, ClassVar

import torch

from hf_lifecycle.libraries import LIBRARIES, is_of_user, library_of, module_of, root_of
from hf_lifecycle.state.modules import MODULE_OWN, kept_of_model, modules_of, parameters_of
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.values.functions import functions_in, variables_of
from hf_lifecycle.torch_internals import MODULE_HOOKS, PARAMETER_HOOKS, children_of

__all__ = [
    "OwnTensors",
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
# Of libraries, these are entered: what they hold decides what is trained, wherever a user's code keeps one.
_ENTERED = ("torch.distributions.", "torch.quasirandom", "transformers.cache_utils")
_CARRIED = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


def reachable(roots: Mapping[str, Any], known: Iterable[Any] = (), *, through_classes: bool = False) -> dict[str, Any]:
    """The modules, optimizers and schedulers within ``roots``, each once, by its path.

    Args:
        known: Objects that are not reported and not entered. A module that has tensors of a known module is entered in
            the place of being reported; of what it holds itself, its :class:`OwnTensors` are.
        through_classes: Whether the user's classes are entered, too: what their methods name.
    """
    known = list(known)
    seen = {id(one) for one in known}
    own = {id(one) for module in known if isinstance(module, torch.nn.Module) for one in _within(module)}
    found: dict[str, Any] = {}
    alive: list[Any] = []  # what is made on the way, such as bound methods, so that no identity is used twice
    queue = deque((name, value, 0) for name, value in roots.items())
    while queue and len(alive) < _MOST:
        name, value, depth = queue.popleft()
        if issubclass(type(value), torch.nn.Module):
            value = unwrapped(value)
        if id(value) in seen or id(value) in own:
            continue
        seen.add(id(value))
        alive.append(value)
        if issubclass(type(value), torch.nn.Module) and any(id(one) in own for one in _within(value)):
            queue.extend((f"{name}.{key}", child, depth) for key, child in children_of(value).items())
            tensors = OwnTensors.of(value, own)
            found |= {name: tensors} if tensors is not None else {}
        elif issubclass(type(value), _CARRIED) or is_stateful(value):
            found[name] = value
            seen.update(id(one) for one in (_within(value) if issubclass(type(value), torch.nn.Module) else ()))
        elif depth < _DEEPEST:
            queue.extend((f"{name}{key}", child, depth + 1) for key, child in _children(value))
            if through_classes:
                queue.extend((f"{name}{key}", child, depth + 1) for key, child in _of_classes(value))
    return found


class OwnTensors:
    """The parameters and buffers that a module holds itself, where it holds a model that is trained as well."""

    _known: ClassVar[weakref.WeakKeyDictionary[torch.nn.Module, OwnTensors]] = weakref.WeakKeyDictionary()

    def __init__(self, module: torch.nn.Module, names: Collection[str]) -> None:
        self._module = weakref.ref(module)
        self._names = names

    @classmethod
    def of(cls, module: torch.nn.Module, others: Collection[int]) -> OwnTensors | None:
        """The same of a module as before; None where it holds none but ``others``, by their ``id()``."""
        if module not in cls._known:
            held = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            cls._known[module] = cls(module, [name for name, one in held.items() if id(one) not in others])
        found = cls._known[module]
        return found if found._names else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        module = self._module()
        return {name: getattr(module, name).detach() for name in self._names} if module is not None else {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, one in self.state_dict().items():
            one.copy_(state[name])


def hooks_of(model: torch.nn.Module, called: str) -> dict[str, list[Any]]:
    """A user's hooks on a model's parameters and modules, where an optimizer may step; names begin with ``called``."""
    of_parameters = {
        f"hooks of {called}.{name}": _without_ours(own)
        for name, one in parameters_of(model).items()
        for own in (getattr(one, key, None) for key in PARAMETER_HOOKS)
        if own
    }
    return of_parameters | _hooks_of_modules(model, called)


@kept_of_model
def _hooks_of_modules(model: torch.nn.Module, called: str) -> dict[str, list[Any]]:
    hooks: dict[str, list[Any]] = {}
    for name, module in modules_of(model):
        held = vars(module)
        for key in MODULE_HOOKS:
            if held.get(key):
                hooks[f"{key} of {called}.{name}" if name else f"{key} of {called}"] = _without_ours(held[key])
    return hooks


def kept_by(model: torch.nn.Module, called: str) -> dict[str, Any]:
    """What a model keeps beside its modules: hooks, and attributes of a user's modules; ``called`` as before."""
    kept: dict[str, Any] = dict(hooks_of(model, called))
    for name, module in modules_of(model):
        if not is_of_library(type(module)):
            within = f"{called}.{name}" if name else called
            kept |= {f"{within}.{key}": one for key, one in vars(module).items() if key not in MODULE_OWN}
    return kept


def hooks_of_optimizer(optimizer: Any, called: str) -> dict[str, list[Any]]:
    """A user's hooks on an optimizer; ``called``: what the names begin with."""
    held = [(key, one) for key, one in attributes_of(optimizer).items() if key.endswith("_hooks") and one]
    return {f"{called}.{key}": _without_ours(one) for key, one in held if isinstance(one, Mapping)}


def kept_by_optimizer(optimizer: Any, called: str) -> dict[str, Any]:
    """What an optimizer keeps beside its state: hooks, and attributes such as an optimizer that it wraps."""
    held = attributes_of(optimizer).items()
    own = {f"{called}.{key}": one for key, one in held if key not in ("state", "param_groups", "defaults")}
    return own | hooks_of_optimizer(optimizer, called)


def _without_ours(hooks: Mapping[int, Any]) -> list[Any]:
    """Those that a user registered; torch numbers them by all that there ever were in the process."""
    return [one for one in hooks.values() if root_of(getattr(one, "__module__", None)) != "hf_lifecycle"]


def _within(module: torch.nn.Module) -> Iterator[Any]:
    yield from module.modules()
    yield from module.parameters()


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if issubclass(kind, (str, bytes, int, float, torch.Tensor, type)) or value is None:
        return
    if issubclass(kind, dict):  # whose own methods may be anything
        for number, (key, one) in enumerate(list(dict.items(value))[:_MOST_ITEMS]):
            yield f".{key}" if type(key) in (str, int) else f"[{number}]", one
    elif issubclass(kind, (list, tuple)):
        held = list.__iter__(value) if issubclass(kind, list) else tuple.__iter__(value)
        yield from ((f"[{number}]", one) for number, one in enumerate(itertools.islice(held, _MOST_ITEMS)))
    elif issubclass(kind, weakref.ref):
        yield "", weakref.ref.__call__(value)
    elif issubclass(kind, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif issubclass(kind, MethodType):
        yield from (("", value.__func__), (".self", value.__self__))
    elif issubclass(kind, FunctionType):
        if not is_of_library(value) or root_of(value.__module__) == "transformers":
            yield from ((f".{one.name}", one.value) for one in variables_of(value))
    elif library_of(module_of(type(value))) not in LIBRARIES:
        yield from ((f".{key}", one) for key, one in list(attributes_of(value).items()))


def _of_classes(value: Any) -> Iterator[tuple[str, Any]]:
    """The user's classes of an object; of a class, the functions and objects in it."""
    if not issubclass(type(value), type):
        yield from ((f".{kind.__name__}", kind) for kind in type(value).__mro__ if is_of_user(kind))
    elif is_of_user(value):
        yield from ((f".{key}", each) for key, one in vars(value).items() for each in functions_in(one) or [one])


def attributes_of(one: Any) -> Any:
    """What an object or a class holds under which name, whatever its class makes of a request for it.

    A mapping in which they can be set, too: ``__dict__``, and where the class has ``__slots__`` with what is in these.
    """
    kind: Any = type(one)
    if issubclass(kind, threading.local):
        return threading.local.__getattribute__(one, "__dict__")  # this thread's
    try:
        held = object.__getattribute__(one, "__dict__")
    except AttributeError:
        held = {}
    slots = _slots_of(kind)
    return Slots(one, slots, held) if slots else held


class Slots(MutableMapping[str, Any]):
    """The attributes of an object whose class has ``__slots__``: those, by what reads and sets them, and others."""

    def __init__(self, one: Any, slots: Mapping[str, Any], others: dict[str, Any]) -> None:
        self._one, self._slots, self._others = one, slots, others

    def __getitem__(self, key: str) -> Any:
        if key not in self._slots:
            return self._others[key]
        try:
            return self._slots[key].__get__(self._one)
        except AttributeError:  # not set yet
            raise KeyError(key) from None

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self._slots:
            self._slots[key].__set__(self._one, value)
        else:
            self._others[key] = value

    def __delitem__(self, key: str) -> None:
        if key in self._slots:
            self._slots[key].__delete__(self._one)
        else:
            del self._others[key]

    def __iter__(self) -> Iterator[str]:
        yield from (key for key in self._slots if key in self)
        yield from list(self._others)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@functools.cache
def _slots_of(kind: type) -> dict[str, Any]:
    own = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base) and not is_of_library(base)]
    return {key: one for held in own for key, one in held.items() if issubclass(type(one), MemberDescriptorType)}


def is_of_library(one: Any) -> bool:
    """Whether a class or a function is of a library whose objects are not a user's; a wrapper, by its code too."""
    if not _is_left(module_of(one)):
        return False
    return not (issubclass(type(one), FunctionType) and is_of_user(one))


@functools.cache
def _is_left(module: str) -> bool:
    return library_of(module) in LIBRARIES and not module.startswith(_ENTERED)


def is_stateful(one: Any) -> bool:
    """Whether it gives its state and takes it: an object of a user's class, such as an average of weights; a scaler."""
    kind = type(one)
    if issubclass(kind, torch.amp.GradScaler):
        return True
    if issubclass(type(one), (type, torch.nn.Module)) or is_of_library(kind):
        return False
    return all(callable(getattr(kind, name, None)) for name in ("state_dict", "load_state_dict"))
