"""What a run is trained with that no argument says: the rows of its data, the numbers in its modules, its code.

A script may be edited between a start and a resume. Compared by their names are the classes of the trainer, the data
and what makes batches of them, the loss function, and callbacks that use what is trained; of the data and the collator
the plain values too. Rows are compared by a few that lie in the dataset as they are:
nothing is read by a user's code, so what is tokenized or augmented on the fly is not looked at. Of modules the class
and the plain numbers are compared, such as a dropout; of optimizer and schedule the class; of a user's classes that
train, the code of their methods, and that of the functions of a schedule.

Not seen: rows that only the code of a dataset makes, those that a few rows miss, and code in functions that methods
call.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import xxhash

from hf_lifecycle.bytecode import names_in, operands_of, texts_of
from hf_lifecycle.data.made_of import made_of
from hf_lifecycle.engine.readable import kinds_of, unlike_kinds
from hf_lifecycle.hosts.trainer.run_state.outside_model import user_callbacks
from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.messages import few
from hf_lifecycle.state.modules import MODULE_OWN, modules_of
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.reachable import attributes_of
from hf_lifecycle.state.values.trees import PLAIN_SCALARS

__all__ = ["capture_program", "same_kinds", "unlike_program"]

_EARLIEST = 1_500_000_000  # seconds of a date that a program may have noted when it began
_NONE = "none"
_TRAINED = frozenset({"model", "optimizer", "lr_scheduler", "train_dataloader", "trainer", "accelerator"})


def capture_program(trainer: Any, loader: Any) -> dict[str, Any]:
    """What it is now, in text that another process of the same program would give; empty where no trainer is seen."""
    if trainer is None:
        return {"rows": "", "model": "", "code": "", "python": "", "kinds": {}, "parts": {}}
    dataset, made = getattr(loader, "dataset", None), made_of(loader)
    return {
        "rows": "\n".join(f"{path} {digest}" for path, digest in sorted(made["rows"].items())),
        "model": "\n".join(f"{path} {value}" for path, value in _numbers_of(trainer)),
        "code": "\n".join(f"{name} {digest}" for name, digest in sorted(_methods_of(trainer, dataset))),
        "python": platform.python_version(),
        "kinds": kinds_of({"optimizer": trainer.optimizer, "scheduler": trainer.lr_scheduler}),
        "parts": dict(_parts_of(trainer, dataset, made["parts"])),
    }


def unlike_program(checkpoint: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """A sentence for each kind that is not as it was when the run began.

    Args:
        checkpoint: What was saved, with what :func:`capture_program` gave then as its ``program``.
    """
    saved, present, found = checkpoint["program"], facts["program"], []
    carried = checkpoint["parts"]["attributes"]["values"]  # that training changed, and that are restored
    kept = {path.rpartition(".")[2] for path in carried}
    rows = [path for path in _changed(saved, present, "rows") if path.rpartition(".")[2] not in kept]
    if rows:
        found.append(f"the training data has other rows than when the run started ({few(rows)})")
    before, now = _lines(saved["model"]), _lines(present["model"])
    model = [path for path in _changed(saved, present, "model") if f"model.{path}" not in carried]
    if model:
        told = [f"{path}: {before.get(path)} -> {now.get(path)}" for path in model]
        found.append(f"the model differs from the one that the run started with: {few(told)}")
    found += unlike_kinds(saved.get("kinds", {}), present["kinds"])  # older checkpoints have none, nor parts
    parts = [
        f"{name}: {was} -> {present['parts'].get(name, _NONE)}"
        for name, was in saved.get("parts", present["parts"]).items()
        if present["parts"].get(name, _NONE) != was and name.rpartition(".")[2] not in kept
    ]
    if parts:
        found.append(
            f"replaced since the run started: {few(parts)}; the run continues with what is there now, and is exact "
            "only if that computes the same"
        )
    code = _changed(saved, present, "code") if saved["python"] == present["python"] else []
    if code:
        found.append(
            f"code was edited since the run started: {few(code)}; the run continues with the new code, and is exact "
            "only if that computes the same"
        )
    return found


def same_kinds(saved: Mapping[str, Any], present: Mapping[str, Any]) -> frozenset[str]:
    """Which of optimizer and scheduler are of the class that they were of when the run began."""
    before = saved.get("kinds", {})
    return frozenset(name for name, kind in present["kinds"].items() if before.get(name, kind) == kind)


def _lines(text: str) -> dict[str, str]:
    return {path: value for path, _, value in (line.partition(" ") for line in text.splitlines())}


def _changed(saved: Mapping[str, Any], present: Mapping[str, Any], kind: str) -> list[str]:
    """What both have, with another value; of the model also what one of them lacks."""
    before, now = _lines(saved[kind]), _lines(present[kind])
    both = [path for path in before if path in now and before[path] != now[path]]
    alone = sorted(before.keys() ^ now.keys()) if kind == "model" else []
    return both + alone


def _numbers_of(trainer: Any) -> Iterator[tuple[str, str]]:
    """Of its modules the classes and the numbers, without what is the time of a start."""
    for name, module in modules_of(unwrapped(trainer.model)):
        yield name or "class", type(module).__qualname__
        for key, value in vars(module).items():
            is_number = type(value) in (int, float, bool) and not _is_time(value)
            if is_number and key not in MODULE_OWN and not key.startswith("_"):
                yield f"{name}.{key}" if name else key, repr(value)


def _parts_of(trainer: Any, dataset: Any, made: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What is trained with, by its name: each what it is called, and plain values of what makes batches.

    Args:
        made: What the parts of the loader are called.
    """
    yield "trainer", _called(type(trainer))
    yield "compute_loss_func", _called(getattr(trainer, "compute_loss_func", None))
    changing = [name for name, one in user_callbacks(trainer).items() if _is_given_what_is_trained(type(one))]
    yield "callbacks", ", ".join(sorted(changing)) or _NONE
    yield "sampler", made["sampler"]
    yield "train_dataset", made["dataset"]
    yield "data_collator", _called(trainer.data_collator)
    for name, one in (("data_collator", trainer.data_collator), ("train_dataset", dataset)):
        if is_of_user(type(one)) or name == "data_collator":
            for key, value in attributes_of(one).items():
                if type(value) in PLAIN_SCALARS and not str(key).startswith("_") and not _is_time(value):
                    yield f"{name}.{key}", repr(Path(value).name if type(value) is str else value)


def _called(one: Any) -> str:
    if one is None:
        return _NONE
    return str(getattr(one, "__qualname__", type(one).__qualname__))


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and _EARLIEST <= value <= time.time()


def _is_given_what_is_trained(kind: type) -> bool:
    """Whether a callback's code uses what it could change training by."""
    codes = [
        code
        for one in kind.__mro__
        if is_of_user(one)
        for method in vars(one).values()
        if isinstance(code := getattr(getattr(method, "__func__", method), "__code__", None), CodeType)
    ]
    used = [names_in(code) | operands_of(code, "LOAD_FAST") | texts_of(code) for code in codes]
    return not _TRAINED.isdisjoint(frozenset().union(*used))


def _methods_of(trainer: Any, dataset: Any) -> Iterator[tuple[str, str]]:
    """The methods of the user's classes that train, by their names."""
    parts = [trainer, *user_callbacks(trainer).values(), dataset, trainer.data_collator]
    parts += [module for _, module in modules_of(unwrapped(trainer.model))]
    loss: Any = getattr(trainer, "compute_loss_func", None)
    seen: set[type] = set()
    schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    functions: list[Any] = [loss, trainer.data_collator, *getattr(schedule, "lr_lambdas", ())]
    for one in functions:
        if issubclass(type(one), FunctionType) and is_of_user(one):
            yield one.__qualname__, _digest_of(one.__code__)
    for one in [*parts, loss]:
        for kind in type(one).__mro__:
            if kind in seen or not is_of_user(kind):
                continue
            seen.add(kind)
            for name, method in vars(kind).items():
                code = getattr(getattr(method, "__func__", method), "__code__", None)
                if isinstance(code, CodeType):
                    yield f"{kind.__qualname__}.{name}", _digest_of(code)


def _digest_of(code: CodeType) -> str:
    return xxhash.xxh3_64_hexdigest(repr(_content(code)).encode())


def _content(code: CodeType) -> Any:
    """What a function does, without where it stands and what its first line says of it."""
    consts = [_content(one) if isinstance(one, CodeType) else _ordered(one) for one in code.co_consts]
    if code.co_consts and isinstance(code.co_consts[0], str) and code.co_flags & 3:
        consts[0] = ""  # its docstring
    return code.co_code, consts, code.co_names, code.co_varnames, code.co_freevars


def _ordered(one: Any) -> Any:
    return sorted(map(repr, one)) if isinstance(one, frozenset) else one
