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


def launch_nodes(folder: Path, plan: list[Any], *, each: int = 1, **variables: str) -> tuple[list[int], str]:
    """Run the script on two nodes of ``each`` ranks. Returns how the agents ended, and what was printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(each)]
    command += ["--master-addr", "127.0.0.1", "--master-port", port, "--max-restarts", "0", "--local-addr", "127.0.0.1"]
    script = ["-m", "tests.distributed.nodes_script", str(folder), json.dumps(plan)]
    files = [folder / f"said-{node}.txt" for node in range(2)]
    nodes = []
    for node, file in enumerate(files):
        with file.open("w") as said:
            given: dict[str, Any] = {"stdout": said, "stderr": subprocess.STDOUT, "start_new_session": True}
            own = [*command, "--node-rank", str(node), *script]
            nodes.append(Popen(own, cwd=ROOT, env=environment(**variables), launches=True, **given))
    return [node.wait(timeout=400) for node in nodes], "\n".join(file.read_text() for file in files)


def run_nodes(folder: Path, plan: list[Any], *, each: int = 1) -> Told:
    codes, output = launch_nodes(folder, plan, each=each)
    assert codes == [0, 0], output
    return told(folder, 2 * each)


INTERRUPTED = ("damaged", "apart", "lost", "lost and damaged", "older", "none", "named", "named none", "named loop")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What each rank has told of all runs, in one launch."""
    folder = tmp_path_factory.mktemp("nodes")
    plan: list[Any] = []

    def mirrored(host: str, name: str = "mirror") -> dict[str, Any]:
        mirror = {"mirror": str(folder / f"{name} of {host}")}
        return {"callback": mirror} if host == "trainer" else mirror

    def damaged_mirror(host: str, delete: list[str]) -> list[Any]:
        """Both nodes lose checkpoints, all copies of which are damaged."""
        run, place = f"{host} damaged mirror", str(folder / f"damaged mirror of {host}")
        lost = ["checkpoint-2", "checkpoint-4", "checkpoint-6"] if delete == ["."] else delete
        deleted = [[host, run, "delete", {"node": node, "names": delete}] for node in range(2)]
        return [*deleted, [host, run, "damage", {"node": 0, "names": lost, "place": place}]]

    for host in HOSTS:
        plan += [
            [host, f"{host} whole", "train", {}],
            [host, f"{host} interrupted", "train", {"until": 5}],
            *[[host, f"{host} {case}", "copy", {"of": f"{host} interrupted"}] for case in INTERRUPTED],
            [host, f"{host} interrupted", "train", {}],
            [host, f"{host} damaged", "damage", {"node": 1, "names": ["checkpoint-4"]}],
            [host, f"{host} damaged", "train", {}],
            [host, f"{host} apart", "delete", {"node": 0, "names": ["checkpoint-4"]}],
            [host, f"{host} apart", "train", {}],
            [host, f"{host} lost", "delete", {"node": 0}],
            [host, f"{host} lost", "train", {}],
            [host, f"{host} lost and damaged", "delete", {"node": 1}],
            [host, f"{host} lost and damaged", "damage", {"node": 0, "names": ["checkpoint-4"]}],
            [host, f"{host} lost and damaged", "train", {}],
            [host, f"{host} older", "delete", {"node": 0, "names": ["checkpoint-2"]}],
            [host, f"{host} older", "delete", {"node": 1, "names": ["checkpoint-4"]}],
            [host, f"{host} older", "train", {}],
            [host, f"{host} mirror", "train", mirrored(host)],
            [host, f"{host} mirror", "delete", {"node": 1}],
            [host, f"{host} mirror", "train", mirrored(host)],
            [host, f"{host} mirror", "delete", {"node": 0}],
            [host, f"{host} mirror", "delete", {"node": 1}],
            [host, f"{host} mirror", "train", mirrored(host)],
            [host, f"{host} damaged mirror", "train", mirrored(host, "damaged mirror")],
            *damaged_mirror(host, delete=["checkpoint-4", "checkpoint-6"]),
            [host, f"{host} damaged mirror", "train", mirrored(host, "damaged mirror")],
            *damaged_mirror(host, delete=["."]),
            [host, f"{host} damaged mirror", "train", mirrored(host, "damaged mirror")],
            [host, f"{host} no mirror", "train", mirrored(host, "not/there")],
            [host, f"{host} none", "damage", {"node": 0, "names": ["checkpoint-2", "checkpoint-4"]}],
            [host, f"{host} none", "damage", {"node": 1, "names": ["checkpoint-2", "checkpoint-4"]}],
            [host, f"{host} none", "train", {}],
            [host, f"{host} shared", "train", {"shared": True}],
        ]
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 5.0}
    best |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so that the first one is the best
    plan += [
        ["trainer", "far behind", "train", {"until": 5, "save_steps": 1}],
        ["trainer", "far behind", "delete", {"node": 0, "names": ["checkpoint-3", "checkpoint-4", "checkpoint-5"]}],
        ["trainer", "far behind", "train", {"until": 5, "save_steps": 1}],
        ["trainer", "best whole", "train", best],
        ["trainer", "best", "train", {"until": 5, **best}],
        ["trainer", "best", "delete", {"node": 1}],
        ["trainer", "best", "train", best],
        ["trainer", "best elsewhere", "train", {"until": 5, **best}],
        ["trainer", "best elsewhere", "delete", {"node": 1, "names": ["checkpoint-2"]}],
        ["trainer", "best elsewhere", "train", best],
        ["trainer", "trainer named", "delete", {"node": 1, "names": ["checkpoint-4"]}],
        ["trainer", "trainer named", "train", {"resume": True}],
        ["trainer", "trainer named none", "delete", {"node": 1}],
        ["trainer", "trainer named none", "train", {"resume": True}],
        ["loop", "loop named loop", "train", {"resume": ["checkpoint-4", "checkpoint-2"]}],
        ["trainer", "kept", "train", {"save_total_limit": 1}],
        ["loop", "kept", "train", {"keep_last": 1, "wait": False}],
        ["files", "transfer", "transfer", {}],
        ["files", "lost connection", "lose", {}],
    ]
    return run_nodes(folder, plan)


def last(ended: Told, run: str) -> Told:
    return [rank[run][-1] for rank in ended]


@pytest.mark.parametrize("host", HOSTS)
def test_every_node_has_the_files_of_all_ranks(host: str, ended: Told) -> None:
    first, second = last(ended, f"{host} whole")
    assert first["names"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert first["files"] == second["files"]
    assert {f"checkpoint-6/lifecycle/rank-0000{rank}.safetensors" for rank in range(2)} <= set(first["files"])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("case", "step"),
    [("interrupted", 4), ("damaged", 2), ("apart", 2), ("lost", 4), ("lost and damaged", 2), ("older", 4)],
)
def test_run_resumes_at_the_newest_step_of_every_node_and_ends_bit_for_bit(
    host: str, case: str, step: int, ended: Told
) -> None:
    for whole, resumed in zip(last(ended, f"{host} whole"), last(ended, f"{host} {case}"), strict=True):
        assert resumed["from"] == f"checkpoint-{step}", resumed
        assert resumed["digests"] == whole["digests"]
        assert resumed.get("rows") == whole.get("rows")
        assert set(resumed["names"]) >= {f"checkpoint-{left}" for left in range(step, 7, 2)}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("case", "rank", "name"),
    [("lost", 0, "checkpoint-4"), ("lost and damaged", 1, "checkpoint-2"), ("older", 1, "checkpoint-4")],
)
def test_node_that_lost_a_checkpoint_gets_it_from_another(
    host: str, case: str, rank: int, name: str, ended: Told
) -> None:
    said = [last(ended, f"{host} {case}")[each]["said"] for each in range(2)]
    assert any(line.endswith(f"{name}: fetched from the node of rank {1 - rank}") for line in said[rank])
    assert not any("fetched" in line for line in said[1 - rank])


@pytest.mark.parametrize("host", HOSTS)
def test_node_that_lost_its_disk_gets_the_checkpoint_from_the_mirror(host: str, ended: Told) -> None:
    for rank, whole in zip(ended, last(ended, f"{host} whole"), strict=True):
        runs = [run for run in rank[f"{host} mirror"] if run.get("from") is not None]
        assert [run["from"] for run in runs] == ["checkpoint-6", "checkpoint-6"]
        assert all(run["digests"] == whole["digests"] for run in runs)
        fetched = [any("checkpoint-6: fetched from /" in line for line in run["said"]) for run in runs]
        assert fetched == [rank is ended[1], True]


@pytest.mark.parametrize("host", HOSTS)
def test_older_checkpoint_of_the_nodes_is_resumed_where_the_newer_copies_of_the_mirror_are_damaged(
    host: str, ended: Told
) -> None:
    for rank, whole in zip(ended, last(ended, f"{host} whole"), strict=True):
        _, resumed, _ = (run for run in rank[f"{host} damaged mirror"] if run["said"])
        assert resumed["from"] == "checkpoint-2"
        assert resumed["digests"] == whole["digests"]


@pytest.mark.parametrize("host", HOSTS)
def test_run_does_not_start_anew_where_the_mirror_has_only_damaged_copies_or_cannot_be_reached(
    host: str, ended: Told
) -> None:
    for rank in last(ended, f"{host} damaged mirror"):
        assert rank["error"].startswith("NoCommonCheckpoint: ")
        for step in (2, 4, 6):
            assert f"mirror: checkpoint-{step}: not intact" in rank["error"]
    for rank in last(ended, f"{host} no mirror"):
        assert rank["error"].startswith("NoCommonCheckpoint: ")
        assert "mount the drive" in rank["error"]


def test_node_that_is_far_behind_does_not_hold_the_others_back(ended: Told) -> None:
    assert {rank["from"] for rank in last(ended, "far behind")} == {"checkpoint-5"}


@pytest.mark.parametrize("case", ["best", "best elsewhere"])
def test_node_that_lost_the_best_checkpoint_gets_it_too(case: str, ended: Told) -> None:
    for rank, whole in zip(last(ended, case), last(ended, "best whole"), strict=True):
        assert rank["from"] == "checkpoint-4"
        assert rank["digests"] == whole["digests"]
    assert {"checkpoint-2", "checkpoint-4"} <= set(last(ended, case)[1]["names"])


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
    for rank in last(ended, "trainer named"):
        assert "rank 0 resumes from checkpoint-4" in rank["error"]
        assert "latest_checkpoint(args.output_dir, save_on_each_node=True)" in rank["error"]
        assert "every node has checkpoint-2 intact" in rank["error"]
    assert any("the nodes have different checkpoints" in line for line in last(ended, "trainer named")[0]["said"])


def test_node_without_a_checkpoint_is_an_error_on_every_rank_where_trainer_would_take_the_newest(ended: Told) -> None:
    for rank in last(ended, "trainer named none"):
        assert rank["error"].startswith("ResumeMismatch: ")
        assert "rank 0 resumes from checkpoint-4" in rank["error"]
        assert "rank 1 resumes from no checkpoint" in rank["error"]
        assert "latest_checkpoint(args.output_dir, save_on_each_node=True)" in rank["error"]


def test_checkpoints_of_different_saves_that_a_loop_is_given_are_refused(ended: Told) -> None:
    for rank in last(ended, "loop named loop"):
        assert "ResumeMismatch" in rank["error"]
        assert "rank 1 resumes from checkpoint-2" in rank["error"]
        assert "leave checkpoint out of resume()" in rank["error"]


def test_each_node_keeps_as_many_checkpoints(ended: Told) -> None:
    for rank in ended:
        assert [run["names"] for run in rank["kept"]] == [["checkpoint-6"], ["checkpoint-6"]]


@pytest.mark.parametrize("host", HOSTS)
def test_kill_between_the_commits_of_two_nodes_resumes_at_the_step_that_both_have(
    host: str, ended: Told, tmp_path: Path
) -> None:
    codes, _ = launch_nodes(tmp_path, [[host, "run", "train", {"kill": "checkpoint-4"}]], HF_LIFECYCLE_TIMEOUT="20")
    assert 0 not in codes
    assert (tmp_path / "node-0/run/checkpoint-4").is_dir()
    assert not (tmp_path / "node-1/run/checkpoint-4").exists()
    resumed = run_nodes(tmp_path, [[host, "run", "train", {}]])
    for rank, whole in zip(resumed, last(ended, f"{host} whole"), strict=True):
        assert rank["run"][0]["from"] == "checkpoint-2"
        assert rank["run"][0]["digests"] == whole["digests"]


def test_file_that_cannot_be_read_or_written_ends_no_transfer_and_is_an_error(ended: Told) -> None:
    first, second = last(ended, "transfer")
    assert "gone" in first["error"]
    assert second["error"].endswith("gone: rank 0 could not read it")
    assert first["here"]["too long"] != second["here"]["too long"]
    alike = {name for name in first["here"] if first["here"][name] == second["here"][name]}
    assert alike == {"folder/first", "empty", "last"}


def test_lost_connection_ends_a_transfer_and_names_the_other_node(ended: Told) -> None:
    (lost,) = last(ended, "lost connection")[:1]
    assert lost["error"].startswith("RankFailed: sending files: failed on other ranks:\n  - rank 1: no connection")


def test_nodes_of_two_ranks_each_give_each_other_what_one_has_lost(tmp_path: Path) -> None:
    plan: list[Any] = []
    for host in HOSTS:
        plan += [[host, f"{host} whole", "train", {}], [host, f"{host} lost", "train", {"until": 5}]]
        plan += [[host, f"{host} lost", "delete", {"node": 0}], [host, f"{host} lost", "train", {}]]
    ended = run_nodes(tmp_path, plan, each=2)
    for host in HOSTS:
        for rank, whole in zip(last(ended, f"{host} lost"), last(ended, f"{host} whole"), strict=True):
            assert rank["from"] == "checkpoint-4"
            assert rank["digests"] == whole["digests"]
        files = set(last(ended, f"{host} whole")[3]["files"])
        assert {f"checkpoint-6/lifecycle/rank-0000{rank}.safetensors" for rank in range(4)} <= files
