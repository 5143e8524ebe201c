"""Two nodes that share no disk: two agents of torchrun on one machine, each with a directory of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.preloaded import Popen

from .launching import ROOT, environment, told

pytestmark = pytest.mark.slow

HOSTS = ("trainer", "loop")
Told = list[dict[str, Any]]


def launch_nodes(folder: Path, plan: list[Any]) -> tuple[list[int], str]:
    """Run the script on two nodes of one rank each. Returns how the agents ended, and what was printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", port, "--max-restarts", "0", "--local-addr", "127.0.0.1"]
    script = ["-m", "tests.distributed.nodes_script", str(folder), json.dumps(plan)]
    files = [folder / f"said-{node}.txt" for node in range(2)]
    nodes = []
    for node, file in enumerate(files):
        with file.open("w") as said:
            given: dict[str, Any] = {"stdout": said, "stderr": subprocess.STDOUT, "start_new_session": True}
            own = [*command, "--node-rank", str(node), *script]
            nodes.append(Popen(own, cwd=ROOT, env=environment(), launches=True, **given))
    return [node.wait(timeout=400) for node in nodes], "\n".join(file.read_text() for file in files)


def run_nodes(folder: Path, plan: list[Any]) -> Told:
    codes, output = launch_nodes(folder, plan)
    assert codes == [0, 0], output
    return told(folder, 2)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What each rank has told of all runs, in one launch."""
    plan: list[Any] = []
    for host in HOSTS:
        plan += [
            [host, f"{host} whole", "train", {}],
            [host, f"{host} interrupted", "train", {"until": 5}],
            [host, f"{host} interrupted", "train", {}],
            [host, f"{host} damaged", "train", {"until": 5}],
            [host, f"{host} damaged", "damage", {"node": 1, "names": ["checkpoint-4"]}],
            [host, f"{host} damaged", "train", {}],
            [host, f"{host} apart", "train", {"until": 5}],
            [host, f"{host} apart", "delete", {"node": 0, "names": ["checkpoint-4"]}],
            [host, f"{host} apart", "train", {}],
            [host, f"{host} none", "train", {"until": 5}],
            [host, f"{host} none", "damage", {"node": 0, "names": ["checkpoint-2", "checkpoint-4"]}],
            [host, f"{host} none", "damage", {"node": 1, "names": ["checkpoint-2", "checkpoint-4"]}],
            [host, f"{host} none", "train", {}],
            [host, f"{host} shared", "train", {"shared": True}],
        ]
    plan += [
        ["trainer", "named", "train", {"until": 5}],
        ["trainer", "named", "delete", {"node": 1, "names": ["checkpoint-4"]}],
        ["trainer", "named", "train", {"resume": True}],
        ["trainer", "kept", "train", {"save_total_limit": 1}],
        ["loop", "kept", "train", {"keep_last": 1, "wait": False}],
    ]
    return run_nodes(tmp_path_factory.mktemp("nodes"), plan)


def last(ended: Told, run: str) -> Told:
    return [rank[run][-1] for rank in ended]


@pytest.mark.parametrize("host", HOSTS)
def test_every_node_has_the_files_of_all_ranks(host: str, ended: Told) -> None:
    first, second = last(ended, f"{host} whole")
    assert first["names"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert first["files"] == second["files"]
    assert {f"checkpoint-6/lifecycle/rank-0000{rank}.safetensors" for rank in range(2)} <= set(first["files"])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("case", "step"), [("interrupted", 4), ("damaged", 2), ("apart", 2)])
def test_run_resumes_at_the_newest_step_of_every_node_and_ends_bit_for_bit(
    host: str, case: str, step: int, ended: Told
) -> None:
    for whole, resumed in zip(last(ended, f"{host} whole"), last(ended, f"{host} {case}"), strict=True):
        assert resumed["from"] == f"checkpoint-{step}", resumed
        assert resumed["digests"] == whole["digests"]
        assert resumed.get("rows") == whole.get("rows")
        assert resumed["names"] == whole["names"]


@pytest.mark.parametrize("host", HOSTS)
def test_without_a_common_step_every_rank_raises_what_each_node_has(host: str, ended: Told) -> None:
    for rank in last(ended, f"{host} none"):
        assert rank["error"].startswith("NoCommonCheckpoint: the nodes have no intact checkpoint in common:")
        for node in range(2):
            assert f"node-{node}/{host} none: damaged-checkpoint-4: damaged" in rank["error"]


@pytest.mark.parametrize("host", HOSTS)
def test_nodes_that_share_a_disk_are_refused(host: str, ended: Told) -> None:
    for rank in last(ended, f"{host} shared"):
        assert "ranks 0 and 1 share" in rank["error"]
        assert "leave save_on_each_node out" in rank["error"]


def test_newest_checkpoint_of_each_node_is_refused_where_the_steps_differ(ended: Told) -> None:
    for rank in last(ended, "named"):
        assert "rank 0 resumes from checkpoint-4" in rank["error"]
        assert "latest_checkpoint(args.output_dir, save_on_each_node=True)" in rank["error"]
        assert "every node has checkpoint-2 intact" in rank["error"]
    assert any("the nodes have different checkpoints" in line for line in last(ended, "named")[0]["said"])


def test_each_node_keeps_as_many_checkpoints(ended: Told) -> None:
    for rank in ended:
        assert [run["names"] for run in rank["kept"]] == [["checkpoint-6"], ["checkpoint-6"]]


@pytest.mark.parametrize("host", HOSTS)
def test_kill_between_the_commits_of_two_nodes_resumes_at_the_step_that_both_have(
    host: str, ended: Told, tmp_path: Path
) -> None:
    codes, _ = launch_nodes(tmp_path, [[host, "run", "train", {"kill": "checkpoint-4"}]])
    assert 0 not in codes
    assert (tmp_path / "node-0/run/checkpoint-4").is_dir()
    assert not (tmp_path / "node-1/run/checkpoint-4").exists()
    resumed = run_nodes(tmp_path, [[host, "run", "train", {}]])
    for rank, whole in zip(resumed, last(ended, f"{host} whole"), strict=True):
        assert rank["run"][0]["from"] == "checkpoint-2"
        assert rank["run"][0]["digests"] == whole["digests"]
