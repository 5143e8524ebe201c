"""Values made again from the trees of :mod:`hf_lifecycle.state.values.trees`, in place where they can be.

Promise: what others hold too, a container, a tensor, a generator, becomes what was saved and stays the same object. No
code of a user's runs: of a user's class, the content and the attributes are set.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum, Flag
from typing import Any

import numpy as np
import torch

from hf_lifecycle.state.reachable import attributes_of
from hf_lifecycle.state.values.encodings import encoding_called, fill_shared, found_by_name, name_of, shared_bytes_of
from hf_lifecycle.state.values.known import KINDS_OF_KEYS, NOTHING_KNOWN, KnownObjects
from hf_lifecycle.state.values.trees import FACTORIES, WITH_STATE, NotPlain

__all__ = ["class_of", "given_back"]

_EMPTY: dict[str, Any] = {
    one.__name__: one for one in (list, tuple, deque, set, frozenset, dict, OrderedDict, defaultdict, Counter)
}
_NUMBERS: dict[str, Any] = {one.__name__: one for one in (int, float, str, bytes)}


def _refuse(own: Any, tree: Any) -> Any:  # noqa: ARG001
    raise NotPlain(f"a {tree['is']} is not a plain value")


def given_back(
    own: Any, tree: Any, left: KnownObjects = NOTHING_KNOWN, other: Callable[[Any, Any], Any] = _refuse
) -> Any:
    """The value that was copied, in the container, tensor or generator ``own`` where it is of the same kind.

    Args:
        own: What is there now.
        tree: What :func:`~hf_lifecycle.state.values.trees.copied` gave.
        left: What its keys may name.
        other: Makes what is not plain of a node, or raises.

    Raises:
        NotPlain: ``own`` is of a kind in which it cannot be.
    """
    if not isinstance(tree, dict):
        return tree
    kind, content = tree["is"], tree["of"]

    def below(one: Any, before: Any = None) -> Any:
        return given_back(before, one, left, other)

    if kind in KINDS_OF_KEYS:
        try:
            return left.key_of(tree)
        except IndexError:
            raise NotPlain("it belongs to a parameter or a module that does not exist now") from None
    if kind in ("tensor", "parameter"):
        return _tensor(own, tree)
    if kind in ("array", "records", "objects"):
        return _in_place(own, _array(tree, below))
    if kind == "member":
        members = class_of(own, tree["class"], Enum)
        return members(content) if issubclass(members, Flag) else members[content]
    if kind == "shared":
        if not fill_shared(own, content):
            raise NotPlain("it is not a buffer of the same size now")
        return own
    if kind == "generator":
        _set_state(own, below(content))
        return own
    if kind in _NUMBERS:
        made = _NUMBERS[kind].__new__(class_of(own, tree["class"], _NUMBERS[kind]), content)
        _set_fields(made, tree, below)
        return made
    if kind in _EMPTY:
        return _container(own, tree, below)
    row = encoding_called(kind)
    if row is None:
        return other(own, tree)
    content = [below(one) for one in content] if row[1].of_values else content
    if type(own) is row[0] and row[1].fill(own, content):
        return own
    return row[1].make(content)


def class_of(own: Any, name: str, base: type) -> Any:
    """The class of this name: that of ``own``, or a user's that is imported.

    Raises:
        NotPlain: There is none, or it is not made from ``base``.
    """
    found = type(own) if name_of(type(own)) == name else found_by_name(name, type)
    if found is None or not issubclass(found, base):
        raise NotPlain(f"there is no class {name} now")
    return found


def _container(own: Any, tree: Any, below: Callable[..., Any]) -> Any:
    base = _EMPTY[tree["is"]]
    kind = class_of(own, tree["class"], base) if "class" in tree else base
    rows = tree["of"]
    if base in (tuple, frozenset):
        made = base.__new__(kind, map(below, rows))
    else:
        made = own if type(own) is kind else _empty(base, kind, tree)
        if issubclass(base, dict):
            before = dict(dict.items(made))
            pairs = [(below(key), one) for key, one in rows]
            base.clear(made)
            for key, one in pairs:
                base.__setitem__(made, key, below(one, before.get(key)))
        else:
            held = list(base.__iter__(made))
            ready = [below(one, _lasting_at(held, number)) for number, one in enumerate(rows)]
            base.clear(made)
            base.update(made, ready) if base is set else base.extend(made, ready)
    _set_fields(made, tree, below)
    return made


def _empty(base: Any, kind: Any, tree: Any) -> Any:
    made, given = base.__new__(kind), tree.get("made")
    if base is deque:
        deque.__init__(made, (), given)
    if base is defaultdict and given is not None:
        if not given:
            raise NotPlain("its default for missing keys is unknown")
        defaultdict.__init__(made, next(one for one in FACTORIES if one.__name__ == given))
    return made


def _lasting_at(held: list[Any], number: int) -> Any:
    one = held[number] if number < len(held) else None
    return one if issubclass(type(one), WITH_STATE) or shared_bytes_of(one) is not None else None


def _set_fields(made: Any, tree: Any, below: Callable[..., Any]) -> None:
    fields = tree.get("fields", {})
    if not fields:
        return
    held = attributes_of(made)
    for key, one in fields.items():
        held[key] = below(one, held.get(key))


def _array(tree: Any, below: Callable[..., Any]) -> Any:
    content = tree["of"]
    if tree["is"] == "records":
        return (
            np.frombuffer(content.tobytes(), np.lib.format.descr_to_dtype(tree["dtype"])).reshape(tree["shape"]).copy()
        )
    if tree["is"] == "objects":
        made = np.empty(len(content), dtype=object)
        for number, one in enumerate(content):
            made[number] = below(one)
        return made.reshape(tree["shape"])
    return content


def _tensor(own: Any, tree: Any) -> Any:
    made = _in_place(own, tree["of"])
    if made is own:
        return made
    if tree["on"] not in ("cpu", made.device.type) and not issubclass(type(own), torch.Tensor):
        made = made.to(tree["on"])  # of a kind, not a number, which another process may have otherwise
    if tree["is"] == "parameter":
        return torch.nn.Parameter(made, requires_grad=tree["leaf"])
    return made.requires_grad_() if tree["leaf"] else made


def _in_place(own: Any, saved: Any) -> Any:
    """``saved`` in the memory of ``own``, which others may hold too; on its device where the shape is another."""
    same = issubclass(type(own), type(saved)) and own.shape == saved.shape and own.dtype == saved.dtype
    if isinstance(saved, torch.Tensor):
        if not same or own.grad_fn is not None:
            return saved.to(own.device) if issubclass(type(own), torch.Tensor) else saved
        with torch.no_grad():
            own.copy_(saved)
        return own
    if not (same and own.flags.writeable):
        return saved.view(type(own)) if issubclass(type(own), np.ndarray) else saved
    own[...] = saved
    return own


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        random.Random.setstate(generator, (state[0], tuple(int(word) for word in state[1]), state[2]))
    else:
        raise NotPlain("it is not a generator now")
