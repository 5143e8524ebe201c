"""What a run is trained with that no argument says: the rows of its data, the numbers in its modules, its code.

A script may be edited between a start and a resume. Compared by their names are the classes of the trainer, the data
and what makes batches of them, the loss function, and callbacks that use what is trained; of the data and the collator
the plain values too. Rows are compared by a few that lie in the dataset as they are: nothing is read by a user's code,
so what is tokenized or augmented on the fly is not looked at. Of modules the class and the plain numbers are compared,
such as a dropout; of optimizer and schedule the class; of a user's classes and functions that train, the code.

Not seen: rows that only the code of a dataset makes, those that a few rows miss, and code in functions that methods
call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

from hf_lifecycle.bytecode import names_in, operands_of, texts_of
from hf_lifecycle.data.made_of import made_of
from hf_lifecycle.engine.readable import kinds_of, unlike_kinds
from hf_lifecycle.hosts.trainer.run_state.outside_model import user_callbacks
from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.messages import few
from hf_lifecycle.state.modules import modules_of
from hf_lifecycle.state.program import (
    code_of,
    edited,
    numbers_of,
    other_model,
    plain_values_of,
    told_of_edits,
    told_of_model,
)
from hf_lifecycle.state.proof import unwrapped

__all__ = ["capture_program", "same_kinds", "unlike_program"]

_NONE = "none"
_TRAINED = frozenset({"model", "optimizer", "lr_scheduler", "train_dataloader", "trainer", "accelerator"})


def capture_program(trainer: Any, loader: Any) -> dict[str, Any]:
    """What it is now, in text that another process of the same program would give; empty where no trainer is seen."""
    if trainer is None:
        return {"rows": "", "model": "", "code": "", "kinds": {}, "parts": {}}
    made = made_of(loader)
    code = {**made["code"], **code_of(_trained_by(trainer))}
    return {
        "rows": _text(sorted(made["rows"].items())),
        "model": _text(numbers_of(unwrapped(trainer.model)).items()),
        "code": _text(sorted(code.items())),
        "kinds": kinds_of({"optimizer": trainer.optimizer, "scheduler": trainer.lr_scheduler}),
        "parts": dict(_parts_of(trainer, made)),
    }


def unlike_program(checkpoint: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """A sentence for each kind that is not as it was when the run began.

    Args:
        checkpoint: What was saved, with what :func:`capture_program` gave then as its ``program``.
    """
    saved, present, found = checkpoint["program"], facts["program"], []
    carried = checkpoint["parts"]["attributes"]["values"]  # that training changed, and that are restored
    kept = {path.rpartition(".")[2] for path in carried}
    before, now = _lines(saved["rows"]), _lines(present["rows"])
    rows = [path for path, one in before.items() if now.get(path, one) != one and path.rpartition(".")[2] not in kept]
    if rows:
        found.append(f"the training data has other rows than when the run started ({few(rows)})")
    model = other_model(_lines(saved["model"]), _lines(present["model"]))
    found += told_of_model(one for path, one in model.items() if f"model.{path}" not in carried)
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
    return found + told_of_edits(edited(_lines(saved["code"]), _lines(present["code"])))


def same_kinds(saved: Mapping[str, Any], present: Mapping[str, Any]) -> frozenset[str]:
    """Which of optimizer and scheduler are of the class that they were of when the run began."""
    before = saved.get("kinds", {})
    return frozenset(name for name, kind in present["kinds"].items() if before.get(name, kind) == kind)


def _lines(text: str) -> dict[str, str]:
    return {path: value for path, _, value in (line.partition(" ") for line in text.splitlines())}


def _text(values: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{path} {value}" for path, value in values)


def _parts_of(trainer: Any, made: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """What is trained with, by its name: each what it is called, and plain values of what makes batches.

    Args:
        made: What the loader is made of.
    """
    yield "trainer", _called(type(trainer))
    yield "compute_loss_func", _called(getattr(trainer, "compute_loss_func", None))
    changing = [name for name, one in user_callbacks(trainer).items() if _is_given_what_is_trained(type(one))]
    yield "callbacks", ", ".join(sorted(changing)) or _NONE
    yield "sampler", made["parts"]["sampler"]
    yield "train_dataset", made["parts"]["dataset"]
    yield "data_collator", _called(trainer.data_collator)
    for path, value in made["values"].items():
        if path.startswith("dataset."):
            yield f"train_{path}", value
    for key, value in plain_values_of(trainer.data_collator).items():
        yield f"data_collator.{key}", value


def _called(one: Any) -> str:
    if one is None:
        return _NONE
    return str(getattr(one, "__qualname__", type(one).__qualname__))


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


def _trained_by(trainer: Any) -> Iterator[Any]:
    """What the code is of, without what makes batches."""
    yield from (trainer, *user_callbacks(trainer).values(), trainer.data_collator)
    yield from (module for _, module in modules_of(unwrapped(trainer.model)))
    schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    yield from (getattr(trainer, "compute_loss_func", None), getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    yield from (schedule, *getattr(schedule, "lr_lambdas", ()))
