"""Exchanges between real processes: the same answer on all, or on all an error that names who is missing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_lifecycle.errors import RankFailed
from hf_lifecycle.processes import rank_store
from hf_lifecycle.processes.ended import has_ended, process_mark
from hf_lifecycle.processes.rank_store import TIMEOUT_VARIABLE
from hf_lifecycle.processes.ranks import Ranks
from tests import preloaded
from tests.many_ranks import EXCHANGES, simulate

WORLD = 3
ROOT = Path(__file__).parent.parent

_CHILD = """
import contextlib, json, os, sys, time
import torch.distributed as dist
from hf_lifecycle.errors import RankFailed, RankUnreachable
from hf_lifecycle.processes.ranks import Ranks

dist.init_process_group("gloo")
ranks = Ranks.current()
told = {}


def caught(action):
    began = time.monotonic()
    try:
        action()
    except (RankFailed, RankUnreachable, OSError) as error:
        return [type(error).__name__, str(error), time.monotonic() - began]


def failing(*on):
    with ranks.agree(what="save"):
        if ranks.rank in on:
            raise OSError(f"disk of rank {ranks.rank} is full")


SCENARIO
print("TOLD " + json.dumps(told))
sys.stdout.flush()
sys.exit(0)
"""


def run_ranks(scenario: str, seconds: float = 30.0, world: int = WORLD) -> list[dict[str, object] | None]:
    """What each rank told; None for one that ended without."""
    outputs = [output for _, output in ended_ranks(scenario, seconds, world)]
    lines = [[line for line in output.splitlines() if line.startswith("TOLD ")] for output in outputs]
    return [json.loads(found[-1][5:]) if found else None for found in lines]


def ended_ranks(scenario: str, seconds: float, world: int) -> list[tuple[int, str]]:
    """The exit code of each rank, and what it printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    env |= {TIMEOUT_VARIABLE: str(seconds), "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    code = _CHILD.replace("SCENARIO", scenario)
    processes = [
        preloaded.Popen([sys.executable, "-c", code], env=dict(env, RANK=str(rank)), stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_one_process_needs_no_one() -> None:
    ranks = Ranks.current()
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    assert ranks.gather({"a": 1}, what="x") == [{"a": 1}]
    assert ranks.gather_bytes(b"\x00", what="x") == [b"\x00"]
    assert ranks.broadcast(None, what="x") is None
    ranks.barrier(what="x")
    with pytest.raises(OSError, match="full"), ranks.agree(what="x"):
        raise OSError("full")


def test_timeout_that_is_no_number_of_seconds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv(TIMEOUT_VARIABLE, wrong)
        with pytest.raises(ValueError, match="HF_LIFECYCLE_TIMEOUT"):
            Ranks.current()


@pytest.mark.slow
def test_every_rank_gets_the_same_answers_and_every_failure_is_told_to_all() -> None:
    told = run_ranks(
        """
told["gather"] = ranks.gather({"rank": ranks.rank, "loss": 0.1}, what="metric")
told["bytes"] = [len(data) for data in ranks.gather_bytes(bytes(1000 * (ranks.rank + 1)), what="rng")]
told["broadcast"] = ranks.broadcast(f"from {ranks.rank}", what="decision")
told["one fails"] = caught(lambda: failing(1))
told["two fail"] = caught(lambda: failing(0, 2))
told["none fails"] = caught(lambda: failing())
time.sleep(1.5 if ranks.rank == 2 else 0)  # longer than one look into the store
ranks.barrier(what="start")
for turn in range(50):
    ranks.barrier(what=f"turn {turn}")
told["keys"] = dist.distributed_c10d._get_default_store().num_keys() if ranks.rank == 0 else 0
ranks.barrier(what="the end")
time.sleep(0 if ranks.rank == 0 else 0.5)  # rank 0 ends at once, and the store with it, but not before all have read
"""
    )
    assert None not in told
    for rank, one in enumerate(told):
        assert one is not None
        assert one["gather"] == [{"rank": r, "loss": 0.1} for r in range(WORLD)]
        assert one["bytes"] == [1000, 2000, 3000]
        assert one["broadcast"] == "from 0"
        kind, message, _ = one["one fails"]  # type: ignore[misc]
        assert kind == ("OSError" if rank == 1 else "RankFailed")
        assert "disk of rank 1 is full" in message
        kind, message, _ = one["two fail"]  # type: ignore[misc]
        assert kind == ("OSError" if rank != 1 else "RankFailed")
        if rank == 1:
            assert "rank 0: OSError: disk of rank 0 is full" in message
            assert "rank 2" in message
        assert one["none fails"] is None
    assert told[0] is not None
    assert int(told[0]["keys"]) < 40  # exchanges that are over are forgotten  # type: ignore[call-overload]


def test_exchange_costs_each_rank_as_many_requests_however_many_ranks_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_store, "_LONGEST_BEAT", 600.0)  # else a machine that is busy makes more of them
    for kind in EXCHANGES:
        few, many = (simulate(count, kind, times=2) for count in (3, 48))
        for who in ("rank 0", "another"):
            assert many[f"requests of {who}"] == few[f"requests of {who}"] <= 10
            assert many[f"bytes of {who}"] < few[f"bytes of {who}"] + 40  # where the others say the same
        assert many["keys left"] - few["keys left"] == 48 - 3  # the word by which each met; exchanges are forgotten


@pytest.mark.slow
def test_rank_that_died_is_named_on_every_other_one_in_bounded_time() -> None:
    began = time.monotonic()
    told = run_ranks(
        """
ranks.barrier(what="meeting")
time.sleep(5 if ranks.rank == 2 else 0)
told["late"] = caught(lambda: ranks.barrier(what="the save at step 20"))
ranks.barrier(what="start")  # the late one too: all are at the same exchange
if ranks.rank == 1:
    os._exit(1)
told["missing"] = caught(lambda: ranks.barrier(what="the save at step 40"))
if ranks.rank == 0:  # it holds the store; rank 1 will never read
    time.sleep(2)
""",
        seconds=3,
    )
    assert time.monotonic() - began < 60
    assert told[1] is None
    for one in (told[0], told[2]):
        assert one is not None
        kind, message, _ = one["late"]  # type: ignore[misc]
        assert (kind, message.partition(" did")[0]) == ("RankUnreachable", "the save at step 20: rank 2")
        kind, message, seconds = one["missing"]  # type: ignore[misc]
        assert kind == "RankUnreachable"
        assert message == "the save at step 40: rank 1: the process has ended; see the output of rank 1"
        assert seconds < 15


@pytest.mark.slow
def test_process_that_has_ended_is_not_waited_for_until_the_time_limit() -> None:
    told = run_ranks(
        """
ranks.barrier(what="meeting")
if ranks.rank == 1:
    os.kill(os.getpid(), 9)
told["ended"] = caught(lambda: ranks.barrier(what="the save at step 40"))
if ranks.rank == 0:  # it holds the store; rank 1 will never read
    time.sleep(2)
""",
        seconds=100,
    )
    for one in (told[0], told[2]):
        assert one is not None
        kind, message, seconds = one["ended"]  # type: ignore[misc]
        assert (kind, message.partition(";")[0]) == (
            "RankUnreachable",
            "the save at step 40: rank 1: the process has ended",
        )
        assert seconds < 50


def test_only_a_process_of_this_machine_that_is_gone_has_ended() -> None:
    mark = process_mark()
    if not mark:
        pytest.skip("only under Linux")
    machine, _, began = mark.split()
    child = subprocess.Popen([sys.executable, "-c", ""])
    zombie = f"{machine} {child.pid} {_begin_of(child.pid)}"
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(zombie)  # nobody has asked for it yet
    child.wait()
    assert has_ended(zombie)
    assert not has_ended(mark)
    assert has_ended(f"{machine} {os.getpid()} {int(began) - 1}")  # another one had the number before
    assert not has_ended(f"elsewhere {child.pid} 1")
    assert not has_ended("")


def _begin_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@pytest.mark.slow
def test_main_rank_that_died_with_the_store_is_named_and_so_is_one_that_is_elsewhere() -> None:
    told = run_ranks(
        """
told["elsewhere"] = caught(lambda: ranks.barrier(what="resume" if ranks.rank == 2 else "save"))
ranks.barrier(what="start")
if ranks.rank == 0:
    ranks._let_all_read()
    os._exit(1)
told["store"] = caught(lambda: ranks.barrier(what="save"))
""",
        seconds=3,
    )
    for rank in (1, 2):
        one = told[rank]
        assert one is not None
        kind, message, _ = one["elsewhere"]  # type: ignore[misc]
        assert kind == "RankUnreachable"
        assert "rank 2 is at: resume" in message
        kind, message, seconds = one["store"]  # type: ignore[misc]
        assert kind == "RankUnreachable"
        assert "rank 0" in message
        assert seconds < 20


@pytest.mark.slow
def test_what_an_earlier_group_attempt_or_training_left_in_the_store_is_never_read() -> None:
    told = run_ranks(
        """
from torch.distributed import PrefixStore, TCPStore
base = dist.distributed_c10d._get_default_store()  # as the agent of torchrun holds it, over all attempts
told["answers"] = []


def attempt(number, last):
    if ranks.rank == number % 3:
        time.sleep(0.5)  # the others come first, to what the attempt before left
    here = Ranks(ranks.rank, ranks.world_size, base)
    for turn in range(last):
        told["answers"].append([number, here.broadcast([number, turn], what="the answer")])
        told["answers"].append([number, here.gather([number, turn], what="the answer")[2]])
    return here


for number, last in enumerate((1, 4, 2, 3)):
    here = attempt(number, last)  # and dies: nothing is taken back
try:
    here.barrier(what=f"rank {ranks.rank}")  # three that are not the same: nobody counts on
except RankUnreachable as error:
    told["elsewhere"] = str(error)
if ranks.rank == 1:
    here._number += 7  # a rank that has counted otherwise, whyever
here.begin()
told["answers"].append([9, here.broadcast([9, 0], what="the answer")])
dist.destroy_process_group()
dist.init_process_group("gloo", store=PrefixStore("again", base), rank=ranks.rank, world_size=3)
again = Ranks.current()
told["is new"] = again is not ranks
told["answers"].append([10, again.broadcast([10, 0], what="the answer")])
"""
    )
    for one in told:
        assert one is not None
        assert len(one["answers"]) == 2 * (1 + 4 + 2 + 3) + 2  # type: ignore[arg-type]
        assert all(number == answer[0] for number, answer in one["answers"])  # type: ignore[attr-defined]
        assert "rank 1 is at: rank 1; rank 2 is at: rank 2" in str(one["elsewhere"])
        assert one["is new"] is True


@pytest.mark.slow
def test_limit_is_on_silence_and_not_on_work() -> None:
    told = run_ranks(
        """
def works(rank, what):
    with ranks.agree(what=what):
        if ranks.rank == rank:
            time.sleep(3)  # twice the limit


told["rank 0 works"] = caught(lambda: works(0, "verifying"))
told["rank 2 works"] = caught(lambda: works(2, "writing"))
with ranks.working("the last copy") if ranks.rank == 1 else contextlib.nullcontext():
    time.sleep(3 if ranks.rank == 1 else 0)
told["outside a block"] = caught(lambda: ranks.barrier(what="the end of the work"))
told["dies"] = None
if ranks.rank == 1:
    os._exit(1)
told["dies"] = caught(lambda: works(0, "with a dead rank"))
if ranks.rank == 0:
    time.sleep(2)
""",
        seconds=1.5,
    )
    assert told[1] is None
    for one in (told[0], told[2]):
        assert one is not None
        assert (one["rank 0 works"], one["rank 2 works"], one["outside a block"]) == (None, None, None)
        kind, message, _ = one["dies"]  # type: ignore[misc]
        assert kind == "RankUnreachable"
        assert message.startswith("with a dead rank: rank 1: the process has ended")


@pytest.mark.slow
def test_interrupt_of_one_rank_is_told_to_all_at_once_and_all_are_at_the_same_exchange_after_it() -> None:
    told = run_ranks(
        """
def interrupted(rank, kind, depth, late):
    with ranks.agree(what="outer"):
        if ranks.rank == rank and depth == 1:
            raise kind
        with ranks.agree(what="inner"):
            if ranks.rank == late:
                time.sleep(5)
            if ranks.rank == rank:
                raise kind
            ranks.barrier(what="within")


told["cases"] = []
for rank in range(3):
    for kind in (KeyboardInterrupt, SystemExit, OSError):
        for depth in (1, 2):
            began = time.monotonic()
            try:
                interrupted(rank, kind, depth, None)
            except BaseException as error:
                told["cases"].append([rank, kind.__name__, type(error).__name__, str(error), ranks.all_present])
            assert time.monotonic() - began < 20
            assert ranks.gather([rank, depth], what="after it") == [[rank, depth]] * 3
began = time.monotonic()
told["early"] = None
try:
    interrupted(1, KeyboardInterrupt, 2, 2)
except BaseException as error:
    told["early"] = [type(error).__name__, time.monotonic() - began]
ranks.barrier(what="after it")
""",
        seconds=60,
    )
    for rank, one in enumerate(told):
        assert one is not None
        assert len(one["cases"]) == 18  # type: ignore[arg-type]
        for victim, kind, seen, text, all_present in one["cases"]:  # type: ignore[attr-defined]
            assert seen == (kind if rank == victim else "RankFailed")
            assert rank == victim or f"rank {victim}: {kind}" in text
            assert all_present == (kind == "OSError")
    assert told[0] is not None
    assert told[0]["early"][0] == "RankFailed"  # type: ignore[index]
    assert told[0]["early"][1] < 4  # it does not wait for rank 2, which is at work  # type: ignore[index]


def test_interrupt_is_known_as_one_where_rank_0_answers_before_its_early_word() -> None:
    told = run_ranks(
        """
ranks.barrier(what="begin")
if ranks.rank == 1:
    lay_down = ranks._store.set

    def late(key, value):
        if key.endswith("/left"):
            time.sleep(1)
        lay_down(key, value)

    ranks._store.set = late
try:
    with ranks.agree(what="save"):
        if ranks.rank == 1:
            raise KeyboardInterrupt
except BaseException as error:
    told["seen"] = [type(error).__name__, ranks.all_present]
ranks.barrier(what="after it")
"""
    )
    failed = ["RankFailed", False]
    assert [one and one["seen"] for one in told] == [failed, ["KeyboardInterrupt", False], failed]


def test_block_that_all_succeed_with_tells_what_each_has_to_tell() -> None:
    told = run_ranks(
        """
with ranks.agree(what="save") as told_here:
    told_here.own = [ranks.rank, None]
told["each"] = told_here.each
try:
    with ranks.agree(what="save") as told_here:
        told_here.own = 1
        if ranks.rank == 2:
            raise OSError("full")
except (OSError, RankFailed):
    told["after"] = list(told_here.each)
"""
    )
    assert told == [{"each": [[0, None], [1, None], [2, None]], "after": []}] * 3
    with Ranks().agree(what="save") as alone:
        alone.own = 7
    assert alone.each == [7]


def test_error_names_each_rank_that_failed() -> None:
    error = RankFailed("save", {1: "OSError: full", 3: "OSError: gone"})
    assert str(error) == "save: failed on other ranks:\n  - rank 1: OSError: full\n  - rank 3: OSError: gone"


def test_process_ends_with_its_own_status_wherever_its_watch_of_the_ranks_is() -> None:
    scenario = """
from hf_lifecycle.processes.rank_watch import RankWatch
watch = RankWatch(ranks, None)
watch._every = 0.0  # it is in the store all the time
time.sleep(0.5)
sys.exit(7)
"""
    assert ended_ranks(scenario, 30.0, 2) == [(7, ""), (7, "")]
