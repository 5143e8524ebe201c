"""Saves of models that FSDP2 shards, in the background: the bytes of the host's own of the same state."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, problems_of

from .launching import launch, told

pytestmark = pytest.mark.slow


def assert_same_shards(ours: Path, theirs: Path, ranks: int = 2) -> None:
    """Every file is there in both, with the same bytes; ``.metadata`` but for the save's own name and place."""
    folders = [path.name for path in sorted(theirs.iterdir())]
    assert folders == ["optimizer_0", "pytorch_model_fsdp_0"]
    for folder in folders:
        names = sorted(path.name for path in (theirs / folder).iterdir())
        assert names == [".metadata", *(f"__{rank}_0.distcp" for rank in range(ranks))]
        assert sorted(path.name for path in (ours / folder).iterdir()) == names
        for name in names[1:]:
            assert (ours / folder / name).read_bytes() == (theirs / folder / name).read_bytes(), f"{folder}/{name}"
        own, stock = (FileSystemReader(place / folder).read_metadata() for place in (ours, theirs))
        assert own.storage_meta is not None
        assert stock.storage_meta is not None
        assert own.storage_meta.save_id != stock.storage_meta.save_id
        own.storage_meta = stock.storage_meta = None
        assert own == stock


OF_TRAINER = ("config.json", "generation_config.json", "model.safetensors", "training_args.bin")


def assert_same_files(ours: Path, theirs: Path, *more: str) -> None:
    """Every file that the host has written is there, with the same bytes; ``more``: beside those of accelerate's."""
    names = sorted(path.name for path in theirs.iterdir())
    assert names == sorted(["optimizer.bin", "pytorch_model_fsdp.bin", *more])
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_background_saves_of_trainer_have_the_bytes_of_the_hosts_own(tmp_path: Path) -> None:
    names = ("trainer", "trainer_full")
    code, output = launch("torchrun", 2, "tests.distributed.shards_script", tmp_path, *names)
    assert code == 0, output
    assert told(tmp_path, 2) == [{name: [] for name in names}] * 2, output
    for name in names:
        out = tmp_path / name / "out"
        events = [(event.event, event.facts.get("step")) for event in read_events(out)]
        assert [step for name, step in events if name == "snapshot"] == [4, 6, 7], events
        assert [step for name, step in events if name == "committed"] == [2, 4, 6, 7]
        for step, checkpoint in checkpoints_in(out):
            assert problems_of(checkpoint, full=True) == []
            if step == 7:
                continue
            beside = tmp_path / name / "beside" / checkpoint.name
            if name == "trainer":
                assert_same_shards(checkpoint, beside)
            else:
                assert_same_files(checkpoint, beside, *OF_TRAINER)


def steps_of(out: Path, event: str) -> list[object]:
    return [one.facts.get("step") for one in read_events(out) if one.event == event]


def test_background_saves_of_a_loop_have_the_bytes_of_accelerates_own_and_follow_what_is_trained(
    tmp_path: Path,
) -> None:
    names = ("loop", "loop_full", "other_plan", "torn", "no_room")
    code, output = launch("torchrun", 2, "tests.distributed.shards_script", tmp_path, *names)
    assert code == 0, output
    said = told(tmp_path, 2)
    for name, captured in (("loop", [4, 6, 8]), ("loop_full", [4, 6, 8]), ("other_plan", [6, 8])):
        run = tmp_path / name / "run"
        assert [one[name] for one in said] == [[], []], output
        assert steps_of(run, "snapshot") == captured
        assert steps_of(run, "committed") == [2, 4, 6, 8]
        for _, checkpoint in checkpoints_in(run):
            assert problems_of(checkpoint, full=True) == []
            is_same = assert_same_files if name == "loop_full" else assert_same_shards
            is_same(checkpoint, tmp_path / name / "beside" / checkpoint.name)
            assert list((run / ".lifecycle" / "parts").iterdir()) == []
    run = tmp_path / "torn" / "run"
    for rank, one in enumerate(said):
        whose = "rank 1: " if rank == 0 else ""
        (warning,) = one["torn"]
        assert warning.startswith(f"checkpoint-4: not saved: {whose}model 0.layers.0.weight changed between the save")
    assert steps_of(run, "committed") == [2, 5, 6, 8]  # step 5 is saved in its place
    (warning,) = said[0]["no_room"]
    why = "rank 1: a snapshot needs 2,532 bytes of host memory, and 0 are free"
    assert warning == (
        "no background saves: save(wait=False) blocks until the checkpoint is written, as save() does; "
        f"the checkpoints are the same: {why}"
    )
    assert said[1]["no_room"] == []
    run = tmp_path / "no_room" / "run"
    assert (steps_of(run, "snapshot"), steps_of(run, "saved")) == ([], [2, 4, 6, 8])


def test_one_rank_alone_saves_its_shards_in_the_background_too(tmp_path: Path) -> None:
    names = ("loop", "loop_full", "trainer_full")  # the last one has tied weights, which are one tensor in its file
    code, output = launch("torchrun", 1, "tests.distributed.shards_script", tmp_path, *names)
    assert code == 0, output
    assert told(tmp_path, 1) == [{name: [] for name in names}], output
    assert steps_of(tmp_path / "trainer_full" / "out", "snapshot") == [4, 6, 7]
    for step in (4, 6):
        ours, theirs = (tmp_path / "trainer_full" / place / f"checkpoint-{step}" for place in ("out", "beside"))
        assert_same_files(ours, theirs, *OF_TRAINER)
    for name in ("loop", "loop_full"):
        assert steps_of(tmp_path / name / "run", "snapshot") == [4, 6, 8]
        for _, checkpoint in checkpoints_in(tmp_path / name / "run"):
            beside = tmp_path / name / "beside" / checkpoint.name
            if name == "loop":
                assert_same_shards(checkpoint, beside, ranks=1)
            else:
                assert_same_files(checkpoint, beside)


def test_rank_whose_disk_is_full_fails_the_save_on_all_by_name_and_nothing_committed_is_lost(tmp_path: Path) -> None:
    code, output = launch("torchrun", 2, "tests.distributed.shards_script", tmp_path, "full")
    assert code == 0, output
    first, second = (one["full"][0] for one in told(tmp_path, 2))
    assert first.startswith("SaveFailed: checkpoint-4 was not saved: RankFailed: writing checkpoint-4: failed on other")
    assert "rank 1: OSError: [Errno 28] No space left on device: " in first
    assert second.startswith("SaveFailed: checkpoint-4 was not saved: OSError: [Errno 28] No space left on device: ")
    assert all("/__1_0.distcp'" in one for one in (first, second))
    run = tmp_path / "full" / "run"
    ((step, checkpoint),) = checkpoints_in(run)
    assert (step, problems_of(checkpoint, full=True)) == (2, [])
    assert [path.name for folder in ("staging", "parts") for path in (run / ".lifecycle" / folder).iterdir()] == []


def test_save_that_rank_0_has_no_room_for_is_left_out_on_all_and_training_continues_by_choice(tmp_path: Path) -> None:
    code, output = launch("torchrun", 2, "tests.distributed.shards_script", tmp_path, "trainer_disk_full")
    assert code == 0, output
    first, second = (one["trainer_disk_full"] for one in told(tmp_path, 2))
    assert [("no space for another checkpoint" in one, "training continues" in one) for one in first] == [(True, True)]
    assert second == []
    out = tmp_path / "trainer_disk_full" / "out"
    assert [(step, problems_of(checkpoint, full=True)) for step, checkpoint in checkpoints_in(out)] == [
        (step, []) for step in (7, 6, 2)
    ]
