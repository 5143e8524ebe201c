"""The program as a process: what it imports, where it writes, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_lifecycle.views.text import plain
from hf_lifecycle.views.wording import size_text

PROBE = """
import sys, json
from typer.testing import CliRunner
from hf_lifecycle.cli.app import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output)
print(json.dumps([name for name in ("torch", "transformers", "accelerate", "matplotlib") if name in sys.modules]))
"""


def test_what_needs_no_torch_imports_neither_torch_nor_transformers(run: Path) -> None:
    checkpoint, directory = str(run / "checkpoint-8"), str(run)
    commands = [
        ["--help"],
        ["list", directory],
        ["doctor", directory],
        ["show", checkpoint],
        ["verify", directory],
        ["verify", directory, "--quick"],
        ["accept", checkpoint],
        ["replay", directory, "--patience", "3"],
        ["prune", directory, "--keep-last", "2"],
    ]
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(commands)], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(ran.stdout) == []


def test_module_runs_as_a_program_with_exit_codes_and_no_traceback(run: Path) -> None:
    def ends(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "hf_lifecycle", *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return ran.returncode, ran.stdout, ran.stderr

    code, out, err = ends("list", str(run), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["newest"] == "checkpoint-8"
    code, out, err = ends("show", str(run / "nothing"))
    assert (code, out) == (2, "")
    assert err.startswith("hf-lifecycle: ")
    assert "Traceback" not in err


def test_reader_that_has_seen_enough_is_no_error(run: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "wb") as closed:
        command = [sys.executable, "-m", "hf_lifecycle", "list", str(run), "--json"]
        ran = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, b"")


@pytest.mark.parametrize("command", ["doctor", "list", "show", "verify", "accept", "diff", "prune", "replay"])
def test_every_command_explains_itself_and_takes_json(invoke: Any, command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_text_is_shown_as_it_is() -> None:
    assert plain("[red]\x1b[2J\u202ea\udc80").plain == "[red]\\x1b[2J\\u202ea\\udc80"


def test_sizes_have_three_digits() -> None:
    assert [size_text(size) for size in (0, 999, 1000, 1 << 20, 3 << 29)] == [
        "0 B", "999 B", "0.977 KiB", "1 MiB", "1.5 GiB",
    ]  # fmt: skip
