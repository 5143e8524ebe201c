"""The names in a function's code, which are read from the bytes of its instructions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import pytest

from hf_lifecycle.bytecode import instructions, operands_of

_OPERATIONS = ("IMPORT_NAME", "LOAD_ATTR", "STORE_ATTR", "STORE_GLOBAL")


def _made(lines: list[str]) -> Callable[..., Any]:
    variables: dict[str, Any] = {}
    exec("def made(one):\n" + "".join(f"    {line}\n" for line in lines), variables)
    return variables["made"]  # type: ignore[no-any-return]


def _within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _within(one)


@pytest.mark.core
@pytest.mark.parametrize("operation", _OPERATIONS)
def test_names_are_those_that_dis_gives(operation: str) -> None:
    for function in (one for one in vars(argparse.ArgumentParser).values() if callable(one)):
        codes = list(_within(function.__code__))
        named = {one.argval for code in codes for one in instructions(code) if one.opname == operation}
        assert operands_of(codes[0], operation) == named


@pytest.mark.core
@pytest.mark.parametrize("many", [1, 255, 256, 257, 70_000])
def test_names_beyond_the_first_256_are_found(many: int) -> None:
    function = _made([f"one.name_{number} = 1" for number in range(many)])
    assert operands_of(function.__code__, "STORE_ATTR") == {f"name_{number}" for number in range(many)}


@pytest.mark.core
def test_names_are_found_in_code_that_python_has_adapted_and_that_is_traced() -> None:
    class Kept:
        pass

    function = _made(["global count", "import sys", "count = 1", "one.first = one.second = count", "return one.first"])
    tracer = sys.gettrace()
    for _ in range(100):
        function(Kept())
    sys.settrace(lambda *_: None)
    try:
        function(Kept())
        code = function.__code__
        found = [operands_of(code, operation) for operation in _OPERATIONS]
    finally:
        sys.settrace(tracer)
    assert found == [{"sys"}, {"first"}, {"first", "second"}, {"count"}]
