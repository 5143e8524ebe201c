"""Starts scripts with ``accelerate launch`` and ``torchrun``, on CPUs, and reads what each rank has to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from tests.preloaded import Popen

__all__ = ["ROOT", "Launcher", "environment", "launch", "start", "told"]

ROOT = Path(__file__).parent.parent.parent
Launcher = Literal["accelerate", "torchrun"]

_COMMANDS: dict[str, list[str]] = {
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"],
}


def environment(**variables: str) -> dict[str, str]:
    """That of a rank on the CPU."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "RANK", "WORLD_"))}
    return env | {
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_LIFECYCLE_TIMEOUT": "60",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }


def start(
    launcher: Launcher,
    ranks: int,
    script: str | Path,
    *arguments: str | Path,
    cwd: Path = ROOT,
    restarts: int = 0,
    is_forked: bool = True,
    **variables: str,
) -> subprocess.Popen[str]:
    """Start ``script`` (a path, or a module with ``-m`` before it) on ``ranks`` processes.

    ``is_forked``: from a process that has imported the libraries, which cannot be told how to import them any more.
    """
    env = environment(**variables)
    program = ["-m", str(script)] if isinstance(script, str) else [str(script)]
    again = ["--max-restarts", str(restarts)] if restarts else []
    command = [sys.executable, *_COMMANDS[launcher], str(ranks), *again, *program, *map(str, arguments)]
    how: dict[str, Any] = {"cwd": cwd, "env": env, "text": True, "start_new_session": True}
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return Popen(command, launches=True, **how) if is_forked else subprocess.Popen(command, **how)


def launch(launcher: Launcher, ranks: int, script: str | Path, *arguments: str | Path, **more: Any) -> tuple[int, str]:
    """Run it to its end. Returns the exit code, and what all ranks printed."""
    process = start(launcher, ranks, script, *arguments, **more)
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


def told(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank wrote to its file in ``folder``."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
