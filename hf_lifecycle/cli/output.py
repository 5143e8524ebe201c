"""Where a command's answer goes: a report as tables or as JSON, an error as one line, and the exit code.

Exit codes: 0 good, 1 bad or different, 2 wrong use. An error of the user's never shows a traceback.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec

import typer
from rich.console import Console, RenderableType

from hf_lifecycle.errors import LifecycleError, MetricNotFound
from hf_lifecycle.views.text import plain

__all__ = ["BAD", "GOOD", "answers", "report"]

GOOD, BAD, WRONG_USE = 0, 1, 2
_WRONG_USES = (MetricNotFound, FileNotFoundError, NotADirectoryError, ValueError, ArithmeticError, ImportError)

P = ParamSpec("P")


def report(data: Mapping[str, Any], draw: Callable[[Mapping[str, Any]], RenderableType], *, as_json: bool) -> None:
    """Print ``data`` on standard output, drawn by ``draw`` or as JSON."""
    if not as_json:
        Console(highlight=False).print(draw(data), crop=False)  # a command to copy stays in one line
        return
    try:
        print(json.dumps(_strict(data), indent=1, allow_nan=False), flush=True)
    except BrokenPipeError:  # whoever read has read enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become the strings ``"nan"``, ``"inf"`` and ``"-inf"``."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def answers(command: Callable[P, int]) -> Callable[P, None]:
    """Turn what a command returns, or an error that it raises, into an exit code and one line."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = command(*args, **kwargs)
        except _WRONG_USES as error:
            code = _complain(error, WRONG_USE)
        except (LifecycleError, OSError, RecursionError) as error:
            code = _complain(error, BAD)
        raise typer.Exit(code)

    return run


def _complain(error: BaseException, code: int) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None and error.filename is not None:
        text = f"{Path(str(error.filename))}: {error.strerror}"
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(plain(f"hf-lifecycle: {text}", style="red" if console.is_terminal else ""))
    return code
