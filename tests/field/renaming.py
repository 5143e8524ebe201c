"""A transformers whose ``Trainer`` calls one of its own methods or attributes something else, as a later one may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType

from transformers import Trainer

__all__ = ["renamed"]


def _in_code(code: CodeType, old: str, new: str) -> CodeType:
    def swap(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new if name == old else name for name in names)

    constants = tuple(_in_code(one, old, new) if isinstance(one, CodeType) else one for one in code.co_consts)
    names = {kind: swap(getattr(code, kind)) for kind in ("co_names", "co_varnames", "co_cellvars", "co_freevars")}
    return code.replace(co_consts=constants, co_name=new if code.co_name == old else code.co_name, **names)


@contextmanager
def renamed(old: str) -> Iterator[None]:
    """Let ``Trainer`` call ``old`` something else, wherever its own methods speak of it."""
    new = f"{old}_of_tomorrow"
    functions = {name: one for name, one in vars(Trainer).items() if isinstance(one, FunctionType)}
    wrapped = [
        inner for one in functions.values() if isinstance(inner := getattr(one, "__wrapped__", None), FunctionType)
    ]
    before = [(one, one.__code__) for one in (*functions.values(), *wrapped)]
    try:
        for one, code in before:
            one.__code__ = _in_code(code, old, new)
        if old in functions:
            delattr(Trainer, old)
            setattr(Trainer, new, functions[old])
        yield
    finally:
        for one, code in before:
            one.__code__ = code
        if old in functions:
            delattr(Trainer, new)
            setattr(Trainer, old, functions[old])
