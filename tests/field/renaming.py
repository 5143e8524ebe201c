"""A class, such as ``Trainer``, that calls one of its own methods or attributes something else, as a later one may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType

from transformers import Trainer

__all__ = ["renamed"]


def _in_code(code: CodeType, old: str, new: str) -> CodeType:
    def swap(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new if name == old else name for name in names)

    def changed(one: object) -> object:
        if isinstance(one, CodeType):
            return _in_code(one, old, new)
        is_keywords = isinstance(one, tuple) and bool(one) and all(isinstance(each, str) for each in one)
        return swap(one) if is_keywords else one  # type: ignore[arg-type]

    constants = tuple(map(changed, code.co_consts))
    names = {kind: swap(getattr(code, kind)) for kind in ("co_names", "co_varnames", "co_cellvars", "co_freevars")}
    return code.replace(co_consts=constants, co_name=new if code.co_name == old else code.co_name, **names)


@contextmanager
def renamed(old: str, owner: type = Trainer) -> Iterator[None]:
    """Let ``owner`` call ``old`` something else, wherever its own methods speak of it."""
    new = f"{old}_of_tomorrow"
    functions = {name: one for name, one in vars(owner).items() if isinstance(one, FunctionType)}
    wrapped = [
        inner for one in functions.values() if isinstance(inner := getattr(one, "__wrapped__", None), FunctionType)
    ]
    before = [(one, one.__code__) for one in (*functions.values(), *wrapped)]
    try:
        for one, code in before:
            one.__code__ = _in_code(code, old, new)
        if old in functions:
            delattr(owner, old)
            setattr(owner, new, functions[old])
        yield
    finally:
        for one, code in before:
            one.__code__ = code
        if old in functions:
            delattr(owner, new)
            setattr(owner, old, functions[old])
