"""The page of limits is that of the tests, and each limit is held by one."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.field.limits import PAGE, limits, section, split_page


def test_page_has_the_limits_of_the_tests() -> None:
    _, written, _ = split_page(PAGE.read_text(encoding="utf-8"))
    assert written.rstrip("\n") == section().rstrip("\n"), "run python -m tests.field.limits"


def test_every_limit_is_held_by_a_test() -> None:
    found = list(limits())
    assert found
    for module, name, _ in found:
        tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
        assert any(isinstance(node.ctx, ast.Load) for node in used), f"{module}.{name} is in no test"
