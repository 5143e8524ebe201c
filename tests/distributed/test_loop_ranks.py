"""A loop on several ranks that is broken off and resumed is, on each of them, the one that was never broken off."""

from __future__ import annotations

from pathlib import Path

import pytest

from .launching import Launcher, launch, told

ON_TWO = (
    *("plain", "both_saves", "augment_2", "stream_0", "stream_2", "dispatched", "dispatched_stream", "split"),
    *("seedable", "generator", "weighted", "roaming", "stateful", "accumulation_odd", "norm", "ema", "unsaved_buffer"),
    *("stopping_ranks", "one_after_another", "side_by_side"),
    *("norm in the background", "both_saves in the background", "one_after_another in the background"),
)


WITHIN = {
    "comparing the buffers of the models",
    "the digests of the objects",
    "verifying the checkpoint",
}  # a block that is agreed on


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "ranks", "names"),
    [("accelerate", 2, ON_TWO), ("torchrun", 4, ("augment_0", "stream_0", "accumulation_odd", "stopping_ranks"))],
    ids=["accelerate-2", "torchrun-4"],
)
def test_every_rank_is_exact(launcher: Launcher, ranks: int, names: tuple[str, ...], tmp_path: Path) -> None:
    code, output = launch(launcher, ranks, "tests.distributed.loop_cases", tmp_path, *names)
    assert code == 0, output
    for rank, found in enumerate(told(tmp_path, ranks)):
        assert found == {name: [] for name in names}, f"rank {rank}"


@pytest.mark.slow
def test_a_rank_that_fails_at_an_exchange_is_named_and_no_one_hangs(tmp_path: Path) -> None:
    code, output = launch("torchrun", 2, "tests.distributed.loop_exchanges", tmp_path)
    assert code == 0, output
    main, other = told(tmp_path, 2)
    assert len(main["exchanges"]) == 22
    for exchange in main["exchanges"]:
        kind, text, ranks, seconds, in_step = main["outcome"][exchange]
        assert kind == ("RankFailed" if exchange in WITHIN else "RankUnreachable"), exchange
        assert ranks == [1], exchange
        assert (exchange if kind == "RankUnreachable" else "MemoryError").removesuffix("a checkpoint") in text
        assert seconds < 30, exchange
        assert in_step == (kind == "RankFailed"), exchange
        assert other["outcome"][exchange][0] == "MemoryError", exchange  # its own error, not that nobody came
        victim = main["interrupted"][exchange][0]
        assert (main, other)[victim]["interrupted"][exchange][1] == "KeyboardInterrupt", exchange
        _, kind, text, ranks, seconds, in_step = (other, main)[victim]["interrupted"][exchange]
        assert (kind, ranks) == ("RankFailed", [victim]), exchange
        assert text.endswith(f"rank {victim}: KeyboardInterrupt"), exchange
        assert seconds < 30, exchange
        assert in_step, exchange
    for rank in (main, other):
        assert (rank["late"][0], rank["late"][-1]) == ("no error", True)
        assert all(f"rank {number}: directory" in rank["elsewhere"] for number in (0, 1))
    assert main["broken"][0] == "RankFailed"
    assert "rank 1" in main["broken"][1]
    assert "OSError: no state here" in main["broken"][1]
    assert main["broken"][2:] == []
    assert other["broken"] == ["OSError", "no state here"]
    for rank in (main, other):
        assert rank["torn"] == ["no error", "checkpoint-1", "checkpoint-3"]
        assert rank["full"][1:] == ["checkpoint-1"]
    assert main["full"][0].startswith("SaveFailed: checkpoint-2 was not saved: OSError: [Errno 28] No space left")
    assert other["full"][0].startswith("RankFailed: ")
    assert "SaveFailed: checkpoint-2 was not saved" in other["full"][0]
    for rank in (main, other):
        assert (rank["file"]["first"], rank["file"]["step"]) == (rank["file"]["again"], 10)
        assert "it has the RNG states of 2 ranks, and there are 1 now" in rank["file"]["alone"]
    assert main["file"]["first"] != other["file"]["first"]
