"""Saves under DeepSpeed, in the background: the bytes of the engine's own of the same state."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, problems_of

from .launching import launch, told

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

LOOPS = ("loop_2", "loop_3")
STAGES = ("zero_1", "zero_2", "zero_3", "zero_3_gathered", "zero_2_offload")
MODULE = "tests.distributed.engine_script"
OTHERWISE = "no background saves: Trainer makes each save, and training stops until it is written; "


def steps_of(out: Path, event: str) -> list[object]:
    return [one.facts.get("step") for one in read_events(out) if one.event == event]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, list[str]]], str]:
    folder = tmp_path_factory.mktemp("saved")
    code, output = launch(
        "torchrun", 2, MODULE, folder, *STAGES, *LOOPS, "other_writer", "torn", "full", is_forked=False
    )
    assert code == 0, output
    return folder, told(folder, 2), output


@pytest.mark.parametrize("stage", STAGES)
def test_background_saves_under_deepspeed_have_the_bytes_of_the_engines_own(saved: tuple, stage: str) -> None:
    folder, said, output = saved
    assert [one[stage] for one in said] == [[], []], output  # no warning; and stock Trainer loads the same state
    out = folder / stage / "out"
    assert steps_of(out, "snapshot") == [4, 6, 7]
    assert steps_of(out, "committed") == [2, 4, 6, 7]
    for step, checkpoint in checkpoints_in(out):
        assert problems_of(checkpoint, full=True) == []
        if step == 7:
            continue
        ours, theirs = files_in(checkpoint), files_in(folder / stage / "beside" / checkpoint.name)
        assert sum(name.endswith("_optim_states.pt") for name in theirs) == 2
        assert sum(name.endswith("_model_states.pt") for name in theirs) == (2 if stage.startswith("zero_3") else 1)
        assert ("model.safetensors" in theirs) == (stage != "zero_3")
        assert {name for name, content in theirs.items() if ours.get(name) != content} == set()


@pytest.mark.parametrize("stage", LOOPS)
def test_background_saves_of_a_loop_under_deepspeed_have_the_bytes_of_the_engines_own(saved: tuple, stage: str) -> None:
    folder, said, output = saved
    assert [one[stage] for one in said] == [[], []], output  # no warning; and DeepSpeed loads the same state
    run = folder / stage / "run"
    assert steps_of(run, "snapshot") == [4, 6, 8]
    assert steps_of(run, "committed") == [2, 4, 6, 8]
    for _, checkpoint in checkpoints_in(run):
        assert problems_of(checkpoint, full=True) == []
        ours, theirs = files_in(checkpoint), files_in(folder / stage / "beside" / checkpoint.name)
        assert sum(name.endswith("_optim_states.pt") for name in theirs) == 2
        assert {name for name, content in theirs.items() if ours.get(name) != content} == set()


def test_engine_with_another_writer_saves_in_the_training_loop_and_a_warning_names_it(saved: tuple) -> None:
    folder, said, _ = saved
    assert [len(one["other_writer"]) for one in said] == [1, 0]
    assert said[0]["other_writer"][0].startswith(OTHERWISE)
    out = folder / "other_writer" / "out"
    assert (steps_of(out, "snapshot"), steps_of(out, "committed")) == ([], [2, 4, 6, 7])
    assert all(problems_of(checkpoint, full=True) == [] for _, checkpoint in checkpoints_in(out))


def test_part_that_changes_while_it_is_copied_is_not_committed_and_the_next_step_is_saved(saved: tuple) -> None:
    folder, said, _ = saved
    for rank, one in enumerate(said):
        (warning,) = one["torn"]
        assert warning.startswith(f"checkpoint-4: not saved: {'rank 1: ' if rank == 0 else ''}optimizer.")
        assert "changed between the save" in warning
    assert steps_of(folder / "torn" / "out", "committed") == [2, 5, 6, 7]


def test_rank_whose_disk_is_full_fails_the_save_on_all_by_name_and_nothing_committed_is_lost(saved: tuple) -> None:
    folder, said, _ = saved
    assert all("rank 1: OSError: [Errno 28] No space left on device: " in one["full"][0] for one in said[:1])
    assert all("_optim_states.pt'" in one["full"][0] for one in said)
    out = folder / "full" / "out"
    assert [(step, problems_of(checkpoint, full=True)) for step, checkpoint in checkpoints_in(out)] == [(2, [])]
    assert [path.name for one in ("staging", "parts") for path in (out / ".lifecycle" / one).iterdir()] == []


def test_killed_ranks_lose_nothing_committed_and_the_run_goes_on_exactly(tmp_path: Path) -> None:
    names = ("killed_2", "killed_3")

    def run(name: str, **variables: str) -> tuple[int, str]:
        limit = {"HF_LIFECYCLE_TIMEOUT": "6"}  # else torchrun waits 30 seconds for who waits for the killed one
        return launch("torchrun", 2, MODULE, tmp_path / name, *names, is_forked=False, **limit, **variables)

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    code, output = run("whole")
    assert code == 0, output
    reached = dict.fromkeys(names, 0)
    # Rank 1 dies before it has written what it has copied, or before rank 0 knows of it; rank 0 while it commits.
    for name, kill, least in (("killed_2", "1 write", 2), ("killed_2", "0 commit", 4), ("killed_3", "1 done", 2)):
        code, output = run("broken", KILL=f"{name} {kill}")
        assert code != 0, f"{name} {kill}: not killed"
        assert "Signal 9" in output or "SIGKILL" in output, output
        committed = checkpoints_in(tmp_path / "broken" / name / "out")
        assert max(reached[name], least) <= committed[0][0] < 7, output
        reached[name] = committed[0][0]
        assert all(problems_of(path, full=True) == [] for _, path in committed)
    code, output = run("broken")
    assert code == 0, output
    for name in names:
        ends = [
            [[line for line in one[name] if line.startswith(("model.", "optimizer."))] for one in told(folder, 2)]
            for folder in (tmp_path / "broken", tmp_path / "whole")
        ]
        assert ends[0] == ends[1]
        assert all(len(lines) > 30 for lines in ends[0])
