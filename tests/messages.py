"""Every text of the package that a user can see, listed once in ``tests/golden/messages.txt``.

From the repository's root, ``python -m tests.messages`` writes the file. A text is any string of the sources with two
words or more that is not a docstring; and the docstring of each command, which is its help. Braces stand for values
that are filled in when the text is shown.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_lifecycle"
LISTED = ROOT / "tests" / "golden" / "messages.txt"
HEAD = """\
Every text that a user of hf_lifecycle can see, by module. Written by: python -m tests.messages
Read it when you change one: plain technical English, the cause and then what to do next (CONTRIBUTING.md, Style).
"""

_TWO_WORDS = re.compile(r"[^\W\d_]{2,}[\w',:;()]* +[\w(\"'{%]")
_MARKUP = re.compile(r"^\s*\.hf-|^M\{|var\(--|^[a-z-]+:[^ ]*;")


def is_shown(text: str) -> bool:
    """Whether a string is prose, and not markup, a style sheet or a pattern."""
    return _TWO_WORDS.search(text) is not None and _MARKUP.search(text) is None


def text_of(node: ast.expr) -> str | None:
    """A string expression as one text, with what is filled in in braces; None where it is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else filled(part.value) for part in node.values)  # type: ignore[attr-defined]
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        if left is not None or right is not None:
            return f"{filled(node.left) if left is None else left}{filled(node.right) if right is None else right}"
    return None


def filled(value: ast.expr) -> str:
    return f"{{{ast.unparse(value)}}}"


def texts(tree: ast.Module, with_docstrings: bool) -> Iterator[str]:
    """The texts of a module, in the order of its lines; a part of another text is not one itself."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if (
            isinstance(node, documented)
            and with_docstrings
            and not isinstance(node, ast.Module)
            and node.name[0] != "_"
        ):
            described = ast.get_docstring(node)
            if described is not None:
                yield f"[{node.name}] {described}"
        text = text_of(node) if isinstance(node, ast.expr) else None
        if text is not None:
            if is_shown(text):
                yield text
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(tree)


def listing() -> str:
    """The file, as text."""
    parts = [HEAD]
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        found = dict.fromkeys(texts(ast.parse(path.read_text(encoding="utf-8")), module == "cli/app.py"))
        if found:
            parts.append(f"\n== {module}\n" + "".join(f"- {text.strip()}\n" for text in found))
    return "".join(parts)


if __name__ == "__main__":
    LISTED.parent.mkdir(exist_ok=True)
    LISTED.write_text(listing(), encoding="utf-8")
    print(LISTED.relative_to(ROOT))
