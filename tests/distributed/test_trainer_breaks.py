"""What breaks on one rank under Trainer: told to all, by name and in bounded time; nothing committed is lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import preloaded

from .launching import ROOT

pytestmark = pytest.mark.slow


def told(folder: Path, scenario: str) -> dict[str, Any]:
    ended = preloaded.run(
        [sys.executable, "-m", "tests.distributed.trainer_breaks", str(folder), scenario],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("TOLD ")]
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: dict[str, Any] = json.loads(lines[-1][5:])
    return found


def test_error_of_one_rank_is_every_ranks_and_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    found = told(tmp_path, "faults")

    def kinds(name: str) -> list[str]:
        return [rank[0] for rank in found[name]["ranks"]]

    def texts(name: str) -> list[str]:
        return [rank[1] for rank in found[name]["ranks"]]

    for name, first, second, words in (
        ("rng", "RankFailed", "OSError", ["rank 1: OSError", "No space left", "rng_state_1.pth"]),
        ("optimizer", "RuntimeError", "RankFailed", ["rank 0: optimizer.pt: RuntimeError"]),
        (
            "manifest",
            "IsADirectoryError",
            "RankFailed",
            ["committing checkpoint-4", "rank 0: IsADirectoryError", "manifest.json"],
        ),
        (
            "manifest later",  # in the background; told at the next save
            "SaveFailed",
            "RankFailed",
            ["finishing the save before", "rank 0: SaveFailed: checkpoint-4", "IsADirectoryError", "manifest.json"],
        ),
        ("object", "RankFailed", "OSError", ["rank 1: OSError", "object.bin"]),
        ("not writing", "RankFailed", "ValueError", ["rank 1: ValueError: not a matter of writing"]),
    ):
        assert kinds(name) == [first, second], name
        other = texts(name)[0 if first == "RankFailed" else 1]
        assert [word for word in words if word not in other] == [], other
        assert found[name]["left"] == {"names": ["checkpoint-2"], "staged": [], "problems": []}, name
    for name in ("continued", "continued commit", "continued later"):
        assert kinds(name) == ["done", "done"], found[name]["ranks"]
        assert found[name]["ranks"][0][1] == found[name]["ranks"][1][1]
        assert found[name]["left"] == {"names": ["checkpoint-2", "checkpoint-6"], "staged": [], "problems": []}, name
    assert kinds("continued twice") == ["done", "done"], found["continued twice"]["ranks"]
    assert found["continued twice"]["left"] == {"names": ["checkpoint-2", "checkpoint-8"], "staged": [], "problems": []}
    for name, victim, kind in (
        ("interrupted", 1, "KeyboardInterrupt"),
        ("interrupted, to continue", 1, "KeyboardInterrupt"),
        ("ended", 0, "SystemExit"),
    ):
        assert kinds(name)[victim] == kind, name
        assert kinds(name)[1 - victim] == "RankFailed", found[name]["ranks"]  # nobody is asked whether to continue
        assert f"rank {victim}: {kind}" in texts(name)[1 - victim]
        assert found[name]["ranks"][1 - victim][-1] < 45, name  # the time limit is 60
        assert found[name]["left"] == {"names": ["checkpoint-2"], "staged": [], "problems": []}, name
    assert kinds("torn") == ["done", "done"], found["torn"]["ranks"]
    names = [f"checkpoint-{step}" for step in (2, 4, 7, 8)]
    assert found["torn"]["left"] == {"names": names, "staged": [], "problems": []}
    assert kinds("other paths") == kinds("other directory") == ["UnsupportedTraining"] * 2
    assert "rank 1 has the output directory" in texts("other paths")[0]
    assert "is not the same directory as on rank 1" in texts("other directory")[1]
    assert kinds("other origins") == ["ResumeMismatch"] * 2
    assert "rank 1 resumes from step 4" in texts("other origins")[0]
    first, second = texts("newest")
    assert first[0] == second[0] == str(tmp_path / "newest" / "checkpoint-6")
    assert (first[1], second[1]) == ("NoUsableCheckpoint", "RankFailed")
    assert "rank 0: NoUsableCheckpoint" in second[2]


def test_rank_that_is_gone_is_named_at_each_exchange_and_the_other_does_not_hang(tmp_path: Path) -> None:
    found = told(tmp_path, "exits")
    total = found.pop("exchanges")
    assert total >= 15
    assert len(found) == total
    for facts in found.values():
        said = facts["said"]
        assert said is not None, facts
        assert said[0] == "RankUnreachable", said
        assert f"rank {facts['gone']}" in said[1], said
        assert said[-1] < 60, said


def test_rank_that_comes_late_to_every_exchange_costs_nothing(tmp_path: Path) -> None:
    found = told(tmp_path, "late")
    in_time, late = found["in time"], found["late"]
    assert [rank[0] for rank in late["ranks"]] == ["done", "done"], late["ranks"]
    assert [rank[1] for rank in late["ranks"]] == [rank[1] for rank in in_time["ranks"]]
    assert late["ranks"][0][1][1] >= 34  # exchanges, each of which one of them came late to
    assert late["left"] == in_time["left"]
    assert late["left"]["staged"] == late["left"]["problems"] == []


def test_killed_in_a_save_one_rank_or_both_lose_nothing_committed_and_end_the_same(tmp_path: Path) -> None:
    found = told(tmp_path, "kills")
    whole = found.pop("whole")
    assert found.pop("counted") == whole
    assert len(found) == 7
    for name, facts in found.items():
        for rank, said in enumerate(facts["broken"]):
            if rank in facts["victims"]:
                assert said is None, (name, said)
            else:  # from this package, or from the gradients' exchange; never done, even after the last commit
                gone = any(words in said[1] for words in ("Connection closed", "Connection reset"))
                assert said[0] == "RankUnreachable" or gone, (name, said)
                assert said[-1] < 90, (name, said)
        assert facts["committed"], name
        assert facts["ended"] == whole, (name, facts["said"])
        assert facts["left"]["staged"] == facts["left"]["problems"] == [], name
