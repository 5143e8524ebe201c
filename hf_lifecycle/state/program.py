"""What of a user's program decides what is trained, in text: the code of its classes and functions, numbers in modules.

Promise: the same program gives the same text in every process of one version of Python, and nothing of it is called.
Not seen: code in functions that methods call.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
import xxhash

from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.messages import few
from hf_lifecycle.state.modules import MODULE_OWN, PLAIN_SCALARS, modules_of
from hf_lifecycle.state.reachable import attributes_of

__all__ = [
    "code_of",
    "digest_of_code",
    "edited",
    "numbers_of",
    "other_model",
    "plain_values_of",
    "told_of_edits",
    "told_of_model",
]

_EARLIEST = 1_500_000_000  # seconds of a date that a program may have noted when it began
_PYTHON = "python"  # beside the names of code: the version that compiled it
_HOLDS: dict[Any, str] = {  # a function, under which name
    **dict.fromkeys((MethodType, classmethod, staticmethod), "__func__"),
    **dict.fromkeys((partial, cached_property), "func"),
    property: "fget",
}


def code_of(parts: Iterable[Any], *, without: CodeType | None = None) -> dict[str, str]:
    """Digests of the user's functions among ``parts``, and of the methods of the user's classes of the others.

    Args:
        without: Code that is left out.
    """
    found: dict[str, list[str]] = {}
    seen: set[Any] = set()
    for part in parts:
        one = _function_in(part)
        if issubclass(type(one), FunctionType) and one not in seen and is_of_user(one):
            seen.add(one)
            found.setdefault(one.__qualname__, []).append(digest_of_code(_innermost(one).__code__))
        for kind in type(one).__mro__:
            if kind in seen:
                continue
            seen.add(kind)
            methods = _methods_of(kind) if is_of_user(kind) else ()
            for name, code in methods:
                if code is not without:
                    found.setdefault(f"{kind.__qualname__}.{name}", []).append(digest_of_code(code))
    return {name: " ".join(digests) for name, digests in found.items()} | {_PYTHON: platform.python_version()}


def _methods_of(kind: type) -> Iterator[tuple[str, CodeType]]:
    for name, method in list(vars(kind).items()):
        function = _function_in(method)
        if issubclass(type(function), FunctionType):
            code = _innermost(function).__code__
            if not (is_dataclass(kind) and code.co_filename == "<string>"):  # which its fields make
                yield name, code


def _function_in(one: Any) -> Any:
    """What a method, a property or a partial function is of; ``one`` itself where it is none of these."""
    while (name := _HOLDS.get(type(one))) is not None:
        one = getattr(one, name)
    return one


def _innermost(function: Any) -> Any:
    """The function within decorators that say what they wrap."""
    while issubclass(type(inner := vars(function).get("__wrapped__")), FunctionType):
        function = inner
    return function


def digest_of_code(code: Any) -> str:
    """Of a function's code; or of plain data with code in it."""
    return xxhash.xxh3_64_hexdigest(repr(_content(code)).encode())


def _content(code: Any) -> Any:
    """What code does, without where it stands and what its first line says of it."""
    if not isinstance(code, CodeType):
        return sorted(map(repr, code)) if isinstance(code, frozenset) else code
    consts = [_content(one) for one in code.co_consts]
    if code.co_consts and isinstance(code.co_consts[0], str) and code.co_flags & 3:
        consts[0] = ""  # its docstring
    return code.co_code, consts, code.co_names, code.co_varnames, code.co_freevars


def edited(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """The names of what both have and was edited; none where another version of Python compiled it."""
    if saved.get(_PYTHON) != present.get(_PYTHON):
        return []
    return [name for name, digest in saved.items() if present.get(name, digest) != digest]


def told_of_edits(names: Iterable[str]) -> list[str]:
    """A sentence on edited code, if there is any."""
    told = list(dict.fromkeys(names))
    if not told:
        return []
    return [
        f"code was edited since the run started: {few(told)}; the run continues with the new code, and is exact only "
        "if that computes the same"
    ]


def numbers_of(model: torch.nn.Module) -> dict[str, str]:
    """Of its modules the classes and the plain numbers, such as a dropout, without what is the time of a start."""
    found = {}
    for name, module in modules_of(model):
        found[name or "class"] = type(module).__qualname__
        for key, value in vars(module).items():
            is_number = type(value) in (int, float, bool) and not _is_time(value)
            if is_number and key not in MODULE_OWN and not key.startswith("_"):
                found[f"{name}.{key}" if name else key] = repr(value)
    return found


def other_model(saved: Mapping[str, str], present: Mapping[str, str]) -> dict[str, str]:
    """What of the numbers is another one, by name; also what only one of them has."""
    return {
        name: f"{name}: {saved.get(name)} -> {present.get(name)}"
        for name in [*saved, *sorted(present.keys() - saved.keys())]
        if saved.get(name) != present.get(name)
    }


def told_of_model(found: Iterable[str]) -> list[str]:
    """A sentence on what :func:`other_model` gives, if there is anything."""
    told = list(found)
    return [f"the model differs from the one that the run started with: {few(told)}"] if told else []


def plain_values_of(one: Any) -> dict[str, str]:
    """The plain values in an object's attributes; of a path its last part, which may be all that stays."""
    return {
        str(key): repr(Path(value).name if type(value) is str else value)
        for key, value in list(attributes_of(one).items())
        if type(value) in PLAIN_SCALARS and not str(key).startswith("_") and not _is_time(value)
    }


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and _EARLIEST <= value <= time.time()
