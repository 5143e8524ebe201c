"""Which packages are libraries, whose objects keep what no training decides, and which lie in a user's own folders.

A program may have a folder ``datasets`` or a file ``evaluate.py`` of its own; and a library may be installed from a
checkout, or into a folder that is on the path. So a name decides only together with where the package lies.
"""

from __future__ import annotations

import builtins
import functools
import importlib.metadata
import sys
import sysconfig
from pathlib import Path
from typing import Any

__all__ = ["LIBRARIES", "is_installed", "library_of", "module_of", "root_of"]

# Of these, the objects are not entered: they are not a user's, or hold no more than what is found elsewhere.
LIBRARIES = frozenset(
    """
    IPython PIL _thread absl accelerate aim aiohttp alembic asyncio boto3 botocore builtins clearml codecarbon
    comet_ml concurrent contextlib datasets deepspeed dvclive fsspec google grpc hf_lifecycle httpx huggingface_hub
    hyperopt inspect io ipykernel ipywidgets logging loguru matplotlib mlflow multiprocessing neptune numpy optuna
    pandas pathlib psutil psycopg2 pymongo pynvml ray re redis requests rich s3fs safetensors select selectors
    signal socket sqlalchemy sqlite3 ssl subprocess swanlab tensorboard tensorboardX threading time tokenizers torch
    torchdata tqdm traceback trackio transformers typing unittest urllib3 uuid vllm wandb zmq
    """.split()  # noqa: SIM905 - a column of names
)
_STANDARD = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
_PACKAGES = frozenset({"site-packages", "dist-packages"})
_STATEMENT = (1 << 9) | (
    1 << 10
)  # flags of a class that a class statement has made: on the heap, and it can have bases


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
    return module


def library_of(module: str | None) -> str:
    """The library that a module is of; empty where it is a user's own."""
    root = root_of(module)
    return root if _is_library(root) else ""


def is_installed(path: Path) -> bool:
    """Whether a file lies where packages are installed."""
    return bool(_PACKAGES & set(path.parts)) or any(path.is_relative_to(place) for place in _STANDARD)


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
