"""Which packages are libraries, whose objects keep what no training decides, and which lie in a user's own folders.

A program may have a folder ``datasets`` or a file ``evaluate.py`` of its own; and a library may be installed from a
checkout, or into a folder that is on the path. So a name decides only together with where the package lies. What a
user's code has put into variables of a library is found there.
"""

from __future__ import annotations

import builtins
import functools
import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Mapping, MutableMapping
from itertools import islice
from operator import is_
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

__all__ = [
    "LIBRARIES",
    "is_installed",
    "is_of_user",
    "library_of",
    "lies_with_user",
    "module_of",
    "put_into_libraries",
    "root_of",
]

_PATCHED = frozenset("accelerate builtins datasets math numpy peft random torch transformers trl".split())  # noqa: SIM905
_MOST_ITEMS = 512  # of a registry
_LARGE = ("nbytes", "parameters")  # what has these is a tensor, an array or a module

# Of these, the objects are not entered: they are not a user's, or hold no more than what is found elsewhere.
LIBRARIES = frozenset(
    """
    IPython PIL _thread absl accelerate aim aiohttp alembic asyncio boto3 botocore builtins clearml codecarbon
    comet_ml concurrent contextlib datasets deepspeed dvclive fsspec google grpc hf_lifecycle httpx huggingface_hub
    hyperopt inspect io ipykernel ipywidgets logging loguru matplotlib mlflow multiprocessing neptune numpy optuna
    pandas pathlib psutil psycopg2 pymongo pynvml ray re redis requests rich s3fs safetensors select selectors
    sentence_transformers signal socket sqlalchemy sqlite3 ssl subprocess swanlab tensorboard tensorboardX
    threading time tokenizers torch torchdata tqdm traceback trackio transformers typing unittest urllib3 uuid vllm
    wandb zmq
    """.split()  # noqa: SIM905 - a column of names
)
_STANDARD = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
_PACKAGES = frozenset({"site-packages", "dist-packages"})
_STATEMENT = (1 << 9) | (1 << 10)  # flags of a class that a class statement made: on the heap, and it can be a base
_NOT_OF_USER = LIBRARIES | {"peft", "trl"}  # though they may lie where a user's code does


def root_of(module: str | None) -> str:
    """The package of a module."""
    return (module or "").partition(".")[0]


def module_of(one: Any) -> str:
    """The name of the module that a class or a function is of; ``"None"`` if its code was executed under no name.

    Such a class has the name of Python's own, which its code finds where variables of a module end.
    """
    module = str(one.__module__)
    if module == "builtins" and isinstance(one, type) and vars(builtins).get(one.__name__) is not one:
        return module if ~one.__flags__ & _STATEMENT else "None"
    if module not in sys.modules and isinstance(one, type) and ~one.__flags__ & _STATEMENT:
        return "builtins"  # of an extension in C that is imported under another name, such as regex's
    return module


def library_of(module: str | None) -> str:
    """The library that a module is of; empty where it is a user's own."""
    root = root_of(module)
    return root if _is_library(root) else ""


def is_installed(path: str | Path) -> bool:
    """Whether a file lies where packages are installed."""
    return _is_for_packages(os.path.dirname(path))


@functools.cache
def _is_for_packages(folder: str) -> bool:
    path = Path(folder)
    return bool(_PACKAGES & set(path.parts)) or any(path.is_relative_to(place) for place in _STANDARD)


def is_of_user(one: Any) -> bool:
    """Whether a module, a class or a function is a user's own, by where it lies.

    A wrapper, which has the ``__module__`` of what it wraps, is also where its code lies.
    """
    if isinstance(one, FunctionType) and lies_with_user(str(one.__globals__.get("__name__"))):
        return True
    return lies_with_user(one.__name__ if isinstance(one, ModuleType) else module_of(one))


@functools.cache
def lies_with_user(module: str) -> bool:
    """Whether a module, by its name, is a user's own; code that was executed without being imported is, too."""
    if (root := root_of(module)) in ("__main__", "hf_lifecycle"):
        return module == "__main__"
    found = sys.modules.get(module)
    if (file := getattr(found, "__file__", None)) is not None:
        return library_of(module) not in _NOT_OF_USER and not is_installed(file)
    held = vars(found) if issubclass(type(found), ModuleType) else {}
    is_part = held.get("__spec__") is not None or "__builtins__" not in held  # of Python, or of an extension in C
    return not (found is not None and is_part) and (root == module or root not in sys.modules or lies_with_user(root))


@functools.cache
def _is_library(root: str) -> bool:
    module = sys.modules.get(root)
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    place = next((Path(one) for one in places if one), None)
    if place is None or is_installed(place) or root == "hf_lifecycle":  # a part of Python has no file
        return True
    try:
        found = importlib.metadata.distribution(root)
    except importlib.metadata.PackageNotFoundError:
        return False
    is_beside = place.is_relative_to(Path(str(found.locate_file(""))))
    return is_beside or '"editable": true' in (found.read_text("direct_url.json") or "")


def put_into_libraries() -> dict[str, Any]:
    """A user's functions, classes and objects in variables and registries of libraries.

    The first call of a process takes as long as a step; a later one looks through what has changed since then.
    """
    found: dict[str, Any] = {}
    queue = _namespaces()
    for space in queue:
        if space.has_changed():
            found |= space.look()
        queue += space.inner
    return found


_modules: list[Any] = []  # that there were when they were looked for last
_spaces: dict[str, _Space] = {}


def _namespaces() -> list[_Space]:
    modules = list(sys.modules.values())
    if len(modules) != len(_modules) or not all(map(is_, modules, _modules)):
        named = [(name, one) for name, one in list(sys.modules.items()) if root_of(name) in _PATCHED]
        held = {name: vars(one) for name, one in named if not lies_with_user(name)}
        if "torch" in held:
            held["torch.Tensor"] = vars(held["torch"]["Tensor"])
        kept = {name: one for name, one in _spaces.items() if one.held is held.get(name)}
        _spaces.clear()
        _spaces.update(
            {name: kept.get(name) or _Space(one, f"{name}.{{}}", is_outer=True) for name, one in held.items()}
        )
        _modules[:] = modules
    return list(_spaces.values())


class _Space:
    """Variables of a library, or the items of a registry, and what they were when they were looked through last.

    Args:
        held: The variables.
        called: How one is named, by its key.
        is_outer: Whether there may be registries among them.
    """

    def __init__(self, held: Mapping[Any, Any], called: str, *, is_outer: bool = False) -> None:
        self.held, self._called, self._is_outer = held, called, is_outer
        self._values: tuple[Any, ...] | None = None
        self._count = 0
        self.inner: list[_Space] = []

    def has_changed(self) -> bool:
        """Whether there is another value than before; no method of one is called."""
        values = self._values
        return values is None or len(self.held) != self._count or not all(map(is_, values, self.held.values()))

    def look(self) -> dict[str, Any]:
        """What a user's code has put there. If there is something, or something large, no value is kept."""
        most = None if self._is_outer else _MOST_ITEMS
        items = list(islice(self.held.items(), most))
        values = [one for _, one in items]
        kinds: set[Any] = set(map(type, values))
        apart, registries = set(filter(_may_be_own, kinds)), set(filter(_is_registry, kinds))
        own = {self._called.format(key): one for key, one in items if type(one) in apart and _is_own(one)}
        self._values = None if own or any(map(_is_large, kinds)) else tuple(values)
        self._count = len(self.held)
        found = [(key, one) for key, one in items if type(one) in registries] if self._is_outer else []
        self.inner = [each for key, one in found for each in self._registries(key, one)]
        return own

    def _registries(self, key: Any, one: Any) -> list[_Space]:
        kind: Any = type(one)
        if str(key).startswith("__"):
            return []
        called = f"{self._called.format(key)}[{{}}]"
        held = [one] if kind is dict else [*vars(kind).values(), *vars(one).values()]
        return [_Space(each, called) for each in held if type(each) is dict]


def _is_own(one: Any) -> bool:
    kind: Any = type(one)
    if kind is FunctionType:
        return lies_with_user(str(one.__globals__.get("__name__")))
    if kind is functools.partial:
        return _is_own(one.func)
    if issubclass(kind, type):
        return type(one.__module__) is str and lies_with_user(module_of(one))
    return _is_kind_of_user(kind)


@functools.cache
def _is_kind_of_user(kind: type) -> bool:
    return is_of_user(kind)


@functools.cache
def _may_be_own(kind: Any) -> bool:
    """Whether an object of this class may be a user's."""
    return kind is FunctionType or kind is functools.partial or issubclass(kind, type) or _is_kind_of_user(kind)


@functools.cache
def _is_large(kind: Any) -> bool:
    return any(hasattr(kind, name) for name in _LARGE)


@functools.cache
def _is_registry(kind: type) -> bool:
    return kind is dict or (root_of(kind.__module__) == "transformers" and issubclass(kind, MutableMapping))
