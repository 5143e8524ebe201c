"""Objects and functions that training put in another's place: which of those that were there at first, or made anew.

Promise: what stood somewhere when training began is found again by that path; a user's function or class by its name;
an object by its class and its attributes, which are set without a call of its methods. What has none of these, such as
a function made within another, is refused.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch

from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.state.reachable import attributes_of, is_stateful
from hf_lifecycle.state.values.bindings import is_trained
from hf_lifecycle.state.values.encodings import found_by_name, name_of
from hf_lifecycle.state.values.known import NOTHING_KNOWN, KnownObjects
from hf_lifecycle.state.values.restoring import class_of, given_back
from hf_lifecycle.state.values.trees import NotPlain, copied

__all__ = ["Standing", "TrainedWithin"]


class TrainedWithin(NotPlain):
    """A value that holds what is carried or named by what looks for modules, optimizers and parameters.

    Attributes:
        is_whole: Whether all of it belongs there, as a group of parameters does.
    """

    def __init__(self, found: Any) -> None:
        super().__init__(f"it holds a {type(found).__qualname__}")
        self.is_whole = issubclass(type(found), torch.nn.Parameter)


_MOST = 1_000  # objects in one value
_IN_PYTHON = 1 << 9  # of a type's flags: it is made by a class statement
_CLASS: Any = vars(object)["__class__"]


class Standing:
    """What stood where when training began; it keeps nothing alive."""

    def __init__(self) -> None:
        self._paths: dict[int, tuple[Any, str, type]] = {}
        self._entered: dict[str, Any] = {}

    def add(self, entered: Mapping[str, Any]) -> None:
        """Remember what was met in a look, by its path."""
        for path, one in _with_modules(entered):
            try:
                reference = weakref.ref(one)
            except TypeError:  # a container, which may be made anew at any time
                continue
            known = self._paths.get(id(one))
            if known is None or known[0]() is not one:
                self._paths[id(one)] = (reference, path, type(one))
            self._entered.setdefault(path, reference)

    def copied(self, value: Any, left: KnownObjects = NOTHING_KNOWN) -> Any:
        """``value`` as a tree.

        Args:
            value: What is copied.
            left: Generators and parameters that others take care of, and what keys may name.

        Raises:
            NotPlain: It holds something that no other process would find.
        """
        made: set[int] = set()

        def node(one: Any, depth: int) -> Any:
            reference, path, kind = self._paths.get(id(one), (None, "", type(None)))
            path = path if reference is not None and reference() is one else ""
            if path and kind is type(one) and _has_places(kind):
                return {"is": "at", "of": path}
            kind = type(one)
            if issubclass(kind, (FunctionType, type)):
                if found_by_name(name_of(one), FunctionType if kind is FunctionType else type) is not one:
                    raise NotPlain(f"{one.__qualname__} is defined while the program runs")
                return {"is": "function" if kind is FunctionType else "class", "of": name_of(one)}
            if kind is MethodType and _method(type(one.__self__), one.__func__.__name__) is one.__func__:
                owner = copied(one.__self__, depth + 1, left=left, other=node)
                return {"is": "method", "of": owner, "name": one.__func__.__name__}
            if kind is functools.partial:
                parts = (one.func, one.args, one.keywords)
                return {"is": "partial", "of": [copied(each, depth + 2, left=left, other=node) for each in parts]}
            if is_trained(one):
                raise TrainedWithin(one)
            if not self._is_an_object(one) or id(one) in made:
                raise NotPlain(f"a {kind.__qualname__} is not a plain value")
            made.add(id(one))
            if len(made) > _MOST:
                raise NotPlain(f"it has more than {_MOST} objects")
            fields = [
                [key, copied(each, depth + 1, left=left, other=node)] for key, each in list(attributes_of(one).items())
            ]
            return {"is": "object", "of": fields, "class": name_of(kind), "at": path}

        return copied(value, left=left, other=node)

    def _is_an_object(self, one: Any) -> bool:
        kind = type(one)
        if issubclass(kind, (torch.nn.Module, torch.Tensor, BaseException)) or is_stateful(one) or not is_of_user(kind):
            return False
        in_python = all(base is object or base.__flags__ & _IN_PYTHON for base in kind.__mro__)
        return in_python and found_by_name(name_of(kind), type) is kind

    def given_back(self, own: Any, tree: Any, left: KnownObjects = NOTHING_KNOWN) -> Any:
        """The value that was copied in an earlier process of the run.

        Args:
            own: What is there now.
            tree: What :meth:`copied` gave.
            left: What its keys may name.

        Raises:
            NotPlain: What it consists of is not found now.
        """

        def made(_: Any, tree: Any) -> Any:
            kind, content = tree["is"], tree["of"]
            if kind == "at":
                found = self._entered.get(content, lambda: None)()
            elif kind in ("function", "class"):
                found = found_by_name(content, FunctionType if kind == "function" else type)
            elif kind == "method":
                owner = given_back(None, content, left, made)
                function = _method(type(owner), tree["name"])
                found = None if function is None else MethodType(function, owner)
            elif kind == "partial":
                function, args, keywords = (given_back(None, one, left, made) for one in content)
                found = functools.partial(function, *args, **keywords)
            elif kind == "object":
                found = _object(self._entered.get(tree["at"], lambda: None)(), tree)
                held = attributes_of(found)
                for key, one in content:
                    held[key] = given_back(None, one, left, made)
            else:
                found = None
            if found is None:
                raise NotPlain(f"{content} does not exist now")
            return found

        return given_back(own, tree, left, made)


def _object(own: Any, tree: Any) -> Any:
    kind = class_of(own, tree["class"], object)
    if not tree["at"]:
        return object.__new__(kind)
    _CLASS.__set__(own, kind)  # others may hold it
    return own


def _has_places(kind: type) -> bool:
    """Whether what such an object holds is in places of its own, so that it is enough to say which one it is."""
    if issubclass(kind, (FunctionType, BuiltinFunctionType, type, torch.nn.Module)):
        return True
    return is_of_user(kind) and not issubclass(kind, torch.Tensor)


def _method(kind: type, name: str) -> Any:
    one = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    return one if issubclass(type(one), FunctionType) else None


def _with_modules(entered: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path, one in entered.items():
        yield path, one
        if issubclass(type(one), torch.nn.Module):
            yield from ((f"{path}.{name}", module) for name, module in one.named_modules() if name)
