"""Starts scripts with ``accelerate launch`` and ``torchrun``, on CPUs, and reads what each rank has to say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = ["ROOT", "by_hand", "launch", "start", "told"]

ROOT = Path(__file__).parent.parent.parent
Launcher = Literal["accelerate", "torchrun"]

_COMMANDS: dict[str, list[str]] = {
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"],
}


def _environment(**variables: str) -> dict[str, str]:
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
    launcher: Launcher, ranks: int, script: str | Path, *arguments: str | Path, cwd: Path = ROOT, **variables: str
) -> subprocess.Popen[str]:
    """Start ``script`` (a path, or a module with ``-m`` before it) on ``ranks`` processes."""
    env = _environment(**variables)
    program = ["-m", str(script)] if isinstance(script, str) else [str(script)]
    command = [sys.executable, *_COMMANDS[launcher], str(ranks), *program, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def launch(launcher: Launcher, ranks: int, script: str | Path, *arguments: str | Path, **more: Any) -> tuple[int, str]:
    """Run it to its end. Returns the exit code, and what all ranks printed."""
    process = start(launcher, ranks, script, *arguments, **more)
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


def by_hand(
    ranks: int, module: str, *arguments: str | Path, each: Sequence[Mapping[str, str]] = (), **variables: str
) -> list[tuple[int, str]]:
    """Run a module on ``ranks`` processes without a launcher, which would end the other ranks when one has ended.

    Args:
        ranks: How many.
        module: What to run.
        arguments: What all of them are given.
        each: More environment variables of each rank.
        variables: And of all.

    Returns:
        Each rank's exit code, and what it printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "RANK": str(rank)}
        own |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        env = _environment(**variables) | own | dict(each[rank] if each else {})
        command = [sys.executable, "-m", module, *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        return [
            (process.returncode, output) for process in processes for output in process.communicate(timeout=200)[:1]
        ]
    finally:
        for process in processes:
            process.kill()


def told(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank wrote to its file in ``folder``."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
